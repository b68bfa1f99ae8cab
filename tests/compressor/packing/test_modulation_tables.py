"""Tables against the network's own modulation, in float64 and in float32."""

import copy

import pytest
import torch
from tiny_model import tiny_config, tiny_dit

from vitapack.compressor.packing.modulation_tables import ModulationTables, exact_sinusoid, stored
from vitapack.runtime.errors import UserError
from vitapack.runtime.format.header import schedule_nodes
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times
from vitapack.runtime.networks.dit import hunyuan_time
from vitapack.runtime.networks.modulation import sinusoid


def tables(dit, nodes, guidance=None):
    return ModulationTables(dit.config, dit.state_dict().__getitem__, nodes, guidance)


def modulation_names(dit):
    return [n for n, linear in dit.config.linears().items() if linear.role == "modulation"]


@pytest.mark.parametrize("guidance", [None, 5.0])
def test_rows_are_the_networks_modulation(guidance):
    dit = tiny_dit(tiny_config(guidance_embed=guidance is not None))
    nodes = [0.0, 1 / 3, 0.5, 0.97]
    made = tables(dit, nodes, guidance)
    value = None if guidance is None else torch.full((4,), guidance)
    vector = dit.step_modulation(torch.tensor(nodes), value).vector
    names = modulation_names(dit)
    assert len(names) == 2 * 2 + 3 + 1
    for name in names:
        rows = made.rows(name)
        assert rows.dtype == torch.float64
        # Guidance 5 is 5000 rad, which float32 knows to 2.4e-4: the tables are the exact side.
        limit = 2e-5 if guidance is None else 4e-4
        expected = dit.get_submodule(name)(vector)
        torch.testing.assert_close(rows.float(), expected, rtol=limit, atol=limit)


def test_tables_are_nearer_to_the_truth_than_the_float32_network():
    dit = tiny_dit(tiny_config())
    nodes = [0.1, 0.43, 0.999]
    wide = copy.deepcopy(dit).double()
    vector = exact_sinusoid(torch.tensor(nodes, dtype=torch.float64), dit.config.time)
    vector = torch.nn.functional.silu(wide.time_in.in_layer(vector))
    vector = torch.nn.functional.silu(wide.time_in.out_layer(vector))
    name = "single_blocks.1.modulation.lin"
    exact = wide.get_submodule(name)(vector)
    assert torch.allclose(tables(dit, nodes).rows(name), exact, rtol=1e-13, atol=1e-13)


def test_sinusoid_agrees_with_the_runtime():
    config = hunyuan_time(64)
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    # float32 sines of arguments up to 1000 rad are off by half their spacing, 3e-5.
    torch.testing.assert_close(
        exact_sinusoid(t, config).float(), sinusoid(t, config), rtol=0, atol=5e-5
    )


def test_half_precision_rounding_is_what_fp16_costs():
    rows = tables(tiny_dit(tiny_config()), [0.2, 0.7]).rows("double_blocks.1.img_mod.lin")
    half = stored(rows, torch.float16, "x")
    relative = (half.double() - rows).norm() / rows.norm()
    assert 5e-5 < relative < 4e-4  # uniform rounding of 11 bits: about 2e-4 rms
    assert (stored(rows, torch.float32, "x").double() - rows).norm() / rows.norm() < 4e-8


def test_nodes_are_the_union_of_the_schedules():
    euler, unipc = SamplerDefaults("euler", 5, 1.0), SamplerDefaults("unipc", 7, 1.0)
    nodes = schedule_nodes([euler, unipc, euler])
    assert nodes == sorted(set(evaluation_times(euler)) | set(evaluation_times(unipc)))


def test_refusals():
    dit = tiny_dit(tiny_config(guidance_embed=True))
    with pytest.raises(UserError, match="embeds its guidance"):
        tables(dit, [0.5])
    with pytest.raises(UserError, match=r"double_blocks\.0\.x: modulation of 7e\+04"):
        stored(torch.tensor([[70_000.0]]), torch.float16, "double_blocks.0.x")
    dit = tiny_dit(tiny_config())
    dit.time_in.in_layer.bias[3] = float("nan")
    with pytest.raises(UserError, match=r"time_in\.in_layer\.bias: 1 of 40"):
        tables(dit, [0.5])
