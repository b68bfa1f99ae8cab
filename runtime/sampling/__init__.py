"""Solvers and guidance: from noise to latents along the flow.

The schedules are in format/schedules.py, since the packed file depends on them. A new solver is a
function in solvers.py and a name in the schedules. May import: format, networks, engines.
"""
