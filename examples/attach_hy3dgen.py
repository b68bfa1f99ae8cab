"""Runs a packed network in hy3dgen's own pipeline, which is otherwise unchanged.

    pip install hy3dgen    # from https://github.com/Tencent-Hunyuan/Hunyuan3D-2
    vitapack compress hunyuan3d-dit-v2-mini --plan int8 --steps 20 -o mini.safetensors
    python examples/attach_hy3dgen.py mini.safetensors chair.png chair.glb

Not run against hy3dgen itself, which could not be installed for development;
tests/runtime/integrations/test_hy3dgen.py uses a stand-in.
"""

import argparse

from vitapack.runtime.integrations.hy3dgen import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed")
    parser.add_argument("image")
    parser.add_argument("out")
    parser.add_argument("--model", default="tencent/Hunyuan3D-2mini")
    parser.add_argument("--subfolder", default="hunyuan3d-dit-v2-mini")
    parser.add_argument(
        "--steps", type=int, default=20, help="a step count of the modulation tables"
    )
    options = parser.parse_args()

    from hy3dgen.shapegen import Hunyuan3DDiTFlowMatchingPipeline

    pipeline = Hunyuan3DDiTFlowMatchingPipeline.from_pretrained(
        options.model, subfolder=options.subfolder
    )
    attach(pipeline, options.packed)
    mesh = pipeline(image=options.image, num_inference_steps=options.steps)[0]
    mesh.export(options.out)


if __name__ == "__main__":
    main()
