"""The readable form of a network whose class has a fused one."""

from torch import Tensor

from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.network import Network


def readable(
    form: type[Network], network: Network, x: Tensor, t: Tensor, cond: Tensor, guidance=None
) -> Tensor:
    """A call of `network` by the blocks of `form`, the readable class that it inherits from."""
    step = network.step_modulation(t, guidance)
    return form.evaluate(network, x, step, Condition.of(cond))
