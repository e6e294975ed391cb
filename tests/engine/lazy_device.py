"""A CPU that behaves like a GPU with one stream: it computes nothing before somebody waits for a value.

Host and device memory are apart, uploads copy what the host has at that moment, and everything else happens in the
order in which it was launched, as late as can be: whoever relies on luck on a GPU fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from fastdeploy.device import Field, Plan, Staging
from fastdeploy.device.cpu import CPUDevice
from fastdeploy.engine.runner import Runner


class LazyDevice(CPUDevice):
    name = "lazy"

    def __init__(self) -> None:
        super().__init__()
        self.stream: list[Callable[[], object]] = []

    def synchronize(self) -> None:
        while self.stream:
            self.stream.pop(0)()

    def plan_sizes(self, most: int) -> Sequence[int]:
        return [*(size for size in (1, 2, 5) if size < most), most]

    def record(self, launches: Callable[[], None]) -> Plan:
        return LazyPlan(self, super().record(launches))

    def write(self, tensor: object, values: np.ndarray) -> None:
        self.synchronize()
        super().write(tensor, values)

    def to_numpy(self, tensor: object) -> np.ndarray:
        self.synchronize()
        return super().to_numpy(tensor)

    def staging(self, fields: Mapping[str, Field]) -> Staging:
        return LazyStaging(self, fields)


class LazyPlan:
    def __init__(self, device: LazyDevice, plan: Plan) -> None:
        self.device, self.plan = device, plan

    def replay(self) -> None:
        self.device.stream.append(self.plan.replay)


class LazyStaging(Staging):
    def __init__(self, device: LazyDevice, fields: Mapping[str, Field]) -> None:
        shared = CPUDevice.staging(device, fields)
        self.stream, self.synchronize = device.stream, device.synchronize
        self.there, self.device = shared.host, shared.device
        self.host = {name: np.zeros_like(array) for name, array in shared.host.items()}

    def upload(self, rows: Iterable[int] | None = None) -> None:
        chosen = slice(None) if rows is None else list(rows)
        copies = {name: array[chosen].copy() for name, array in self.host.items()}

        def arrive() -> None:
            for name, values in copies.items():
                self.there[name][chosen] = values

        self.stream.append(arrive)

    def fetch(self, name: str) -> Callable[[], np.ndarray]:
        found = np.zeros_like(self.there[name])
        self.stream.append(lambda: np.copyto(found, self.there[name]))

        def values() -> np.ndarray:
            self.synchronize()
            return found

        return values


class LazyRunner(Runner):
    """Its launches outside plans wait for their turn, too."""

    recording = False

    def _decode(self, *arguments: int) -> None:
        self.recording = True
        super()._decode(*arguments)
        self.recording = False

    def attend(self, *arguments: int, **named: int) -> None:
        self._in_turn(lambda: super(LazyRunner, self).attend(*arguments, **named))

    def project(self, *arguments: int) -> None:
        self._in_turn(lambda: super(LazyRunner, self).project(*arguments))

    def _in_turn(self, launches: Callable[[], None]) -> None:
        if self.recording:
            launches()
        else:
            self.device.stream.append(launches)
