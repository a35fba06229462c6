"""A GPU that is not there: Triton compiles for it as at a user's call, and then runs nothing.

Launches go through Triton's own JIT, with its specialisation on arguments and its cache, so what is compiled here is
what a GPU would be given. Only the driver is replaced, and tensors may be meta tensors.
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from gqa.ops.launch import Launch


class AbsentDriver:
    """The part of Triton's CUDA driver that a launch asks. The number of the device is its compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self
        self.launcher_cls = lambda source, metadata: _launch_nothing

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}  # by how much a block is too large can be told only once it is compiled

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        """(module, function, registers, spills, most threads of a block): the first four are read off elsewhere."""
        return None, None, 0, 0, 1024

    def unload_module(self, module: None) -> None:
        pass


def compile_for(capability: int, launch: Launch) -> Any:
    """What `launch.run()` would run on a GPU of this capability, as Triton's compiled kernel."""
    driver.set_active(AbsentDriver(capability))  # pyright: ignore[reportArgumentType]
    launch.kernel.device_caches.pop(capability, None)
    launch.run()
    (compiled,) = launch.kernel.device_caches[capability][0].values()
    return compiled


def _launch_nothing(*arguments: Any) -> None:
    pass
