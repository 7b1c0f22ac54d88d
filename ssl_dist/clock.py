"""The progress of a training in optimizer steps, which every schedule is a function of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """step: steps completed; steps_per_epoch: steps in which every image is seen once; total_steps: steps at which the
    training ends."""

    step: int
    steps_per_epoch: int
    total_steps: int

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0, to which the next step belongs."""
        return self.step // self.steps_per_epoch

    @property
    def epochs_done(self) -> float:
        """Epochs completed, with the fraction of the current one."""
        return self.step / self.steps_per_epoch

    @property
    def total_epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch

    @property
    def progress(self) -> float:
        """Share of the training that is completed, in [0, 1]."""
        return self.step / max(1, self.total_steps)

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    def after_step(self) -> "Clock":
        return Clock(self.step + 1, self.steps_per_epoch, self.total_steps)

    def due(self, every_steps: int | None = None, every_epochs: int | None = None) -> bool:
        """Whether something that happens every so many steps or epochs happens now, after `step` steps."""
        by_steps = every_steps is not None and self.step % every_steps == 0
        by_epochs = every_epochs is not None and self.step % (every_epochs * self.steps_per_epoch) == 0
        return self.step > 0 and (by_steps or by_epochs)
