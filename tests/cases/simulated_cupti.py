"""A stand-in for `cupti.pm_sampling` that plays a GPU before Hopper and each of its failures."""

from types import SimpleNamespace


class CuptiError(Exception):
    """CUPTI's own error."""


ALL = {
    "sm__cycles_active": 80.0,
    "sm__warps_active": 40.0,
    "sm__pipe_tensor_cycles_active": 60.0,
    "dram__read_throughput": 20.0,
    "dram__write_throughput": 15.0,
}


class SimulatedCupti:
    """A module with `Collector` and `TriggerMode`; its samples are `lengths` long, and read `percents` in each.

    Args:
        metrics: the metrics this chip has, with what they read in percent in every sample, or a list, one a sample.
        lengths: of the samples, nanoseconds.
        together: metrics that fit in one pass.
        timed: whether sampling by time is supported; by cycles always is.
        refused: names of calls, with the error each raises; more may be added in mid-run.
    """

    TriggerMode = SimpleNamespace(GPU_TIME_INTERVAL="time", GPU_SYSCLK_INTERVAL="cycles")

    def __init__(self, metrics=None, lengths=(2_000_000,) * 5, together=8, timed=True, refused=None):
        self.metrics = ALL if metrics is None else metrics
        self.lengths, self.together, self.timed, self.refused = lengths, together, timed, dict(refused or {})
        self.calls, self.devices = [], []
        self.configured = None

    def called(self, name):
        self.calls.append(name)
        if name in self.refused:
            raise self.refused[name]

    def Collector(self, device_index=0):
        self.devices.append(device_index)
        return SimulatedCollector(self)


class SimulatedCollector:
    """One device's sampling session."""

    def __init__(self, library):
        self.library, self.sampling = library, False

    def enable(self):
        self.library.called("enable")

    def configure(self, *, metrics, hardware_buffer_size, sampling_interval, trigger_mode):
        assert hardware_buffer_size > 0
        assert isinstance(sampling_interval, int)
        if trigger_mode == "time" and not self.library.timed:
            raise ValueError("TriggerMode.GPU_TIME_INTERVAL is not supported on this GPU")
        for name in metrics:
            base, _, rest = name.partition(".")
            assert rest == "avg.pct_of_peak_sustained_elapsed"
            if base not in self.library.metrics:
                raise ValueError(f"Metric {name!r} is invalid or not supported")
        if len(metrics) > self.library.together:
            raise ValueError("the metrics cannot be collected in a single pass")
        self.library.configured = (trigger_mode, list(metrics))

    def start(self):
        self.library.called("start")
        assert not self.sampling
        self.sampling = True

    def stop(self):
        self.library.called("stop")
        assert self.sampling
        self.sampling = False

    def decode(self, max_samples):
        self.library.called("decode")
        assert max_samples >= len(self.library.lengths)
        names = self.library.configured[1]
        return Decoded(names, [self._sample(i, names) for i in range(len(self.library.lengths))])

    def _sample(self, index, names):
        start = sum(self.library.lengths[:index])
        values = [self.library.metrics[name.partition(".")[0]] for name in names]
        values = [value[index] if isinstance(value, list) else value for value in values]
        return SimpleNamespace(
            start_timestamp=start, end_timestamp=start + self.library.lengths[index], metric_values=values
        )


class Decoded(list):
    """Completed samples, and the metrics they hold."""

    def __init__(self, metrics, samples):
        super().__init__(samples)
        self.metrics = metrics
