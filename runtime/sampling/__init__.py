"""Solvers and guidance: from noise to latents along the flow.

Schedules are in format/schedules.py, because the packed file depends on them. A new solver is a
function in solvers.py and a name in the schedules. May import: format, networks, engines.
"""
