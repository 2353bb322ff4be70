"""Callbacks that show or write down how a fit goes on."""

import csv
import io
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pyro_vnd._files import remove_unfinished, replaced, resolved, writing
from pyro_vnd._sizes import is_integer
from pyro_vnd.infer.callbacks import Callback
from pyro_vnd.infer.run import Run

__all__ = ["CSVLogger", "LivePlot", "ProgressBar", "TensorBoardLogger", "epoch_numbers"]


def epoch_numbers(run: Run) -> dict[str, float]:
    """Return what is known of the last epoch: parts of the ELBO, metrics, and the mean length of each mask."""
    result = run.result
    by_epoch = {name: values for name, values in vars(result).items() if isinstance(values, list)}
    by_epoch |= result.metrics | {f"mean_length/{name}": values for name, values in result.mean_length.items()}
    return {name: values[-1] for name, values in by_epoch.items() if len(values) == run.epoch}


class ProgressBar(Callback):
    """Show epochs, the time they take and the last numbers; within the first epoch of a long one, steps.

    Example:
        >>> ProgressBar().close()
    """

    def __init__(self) -> None:
        self._bar: Any = None

    def on_fit_start(self, run: Run) -> None:
        """Show the bar, in the first process."""
        self._bar = tqdm(
            desc="fit", unit="epoch", initial=run.epoch, total=run.num_epochs, disable=not run.is_first, miniters=1
        )

    def on_step(self, run: Run) -> None:
        """Show how far the first epoch is, which has nothing else to show."""
        if run.epoch == 0 and run.num_epochs < run.num_steps:
            self._bar.set_postfix_str(f"step {run.step} of {run.num_steps // run.num_epochs}", refresh=False)
            self._bar.update(0)

    def on_epoch(self, run: Run) -> None:
        """Show the last numbers."""
        self._bar.set_postfix_str(run.result.progress(), refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class CSVLogger(Callback):
    """Write a line for each epoch into a CSV file.

    A fit that goes on adds to its file; another one writes it anew.

    Args:
        path: The file; its folder must exist.

    Raises:
        ValueError: If it is no path, or the folder does not exist.

    Example:
        >>> CSVLogger("fit.csv").path.name
        'fit.csv'
    """

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, str | Path) or "\0" in str(path):
            raise ValueError(f"CSVLogger: argument `path` must be the path of a file; got {path!r}")
        self.path = Path(path)
        with writing("CSVLogger: argument `path`", self.path):  # looking may be forbidden, too
            self.path = resolved(self.path)
            is_possible = not self.path.is_dir() and self.path.parent.is_dir()
        if not is_possible:
            raise ValueError(f"CSVLogger: argument `path` must be a file in a folder that exists; got {str(path)!r}")
        self._names: list[str] = []

    def on_fit_start(self, run: Run) -> None:
        """Drop the lines of epochs that are not over, and of another fit."""
        if not run.is_first:
            return
        remove_unfinished(self.path)
        rows = []
        if run.epoch and self.path.exists():
            with self.path.open(newline="") as file:
                whole = (row for row in csv.DictReader(file) if None not in row.values())  # one may be cut short
                rows = [row for row in whole if int(row["epoch"]) <= run.epoch]
        self._write(rows)

    def on_epoch(self, run: Run) -> None:
        """Add a line."""
        if not run.is_first:
            return
        row = {"epoch": run.epoch, "step": run.step, "seconds": f"{run.result.seconds:.3f}", **epoch_numbers(run)}
        if [*row] == self._names:
            with writing("CSVLogger: argument `path`", self.path), self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._names).writerow(row)
        else:
            with self.path.open(newline="") as file:
                rows = [*csv.DictReader(file), row]
            self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._names = list(dict.fromkeys(name for row in rows for name in row))
        whole = replaced(self.path)  # so that no line is lost where this is cut short
        with writing("CSVLogger: argument `path`", self.path), whole as path, path.open("w", newline="") as file:
            if rows:
                writer = csv.DictWriter(file, self._names)
                writer.writeheader()
                writer.writerows(rows)


class TensorBoardLogger(Callback):
    """Write the numbers of each epoch for TensorBoard, `tensorboard --logdir FOLDER`.

    Args:
        folder: Where the event files go.
        every_steps: Steps after which parts of the objective of one step are written, too; None for never.

    Raises:
        ModuleNotFoundError: If tensorboard is not installed.
        ValueError: If an argument is invalid.
    """

    def __init__(self, folder: str | Path, *, every_steps: int | None = None) -> None:
        if not isinstance(folder, str | Path) or "\0" in str(folder):
            raise ValueError(f"TensorBoardLogger: argument `folder` must be the path of a folder; got {folder!r}")
        if every_steps is not None and (not is_integer(every_steps) or every_steps < 1):
            raise ValueError(
                f"TensorBoardLogger: argument `every_steps` must be an integer at least 1, or None; got {every_steps!r}"
            )
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError("TensorBoardLogger needs tensorboard: pip install tensorboard") from error
        self.folder, self.every_steps = Path(folder), every_steps
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def on_fit_start(self, run: Run) -> None:
        """Open the file; what another run wrote after this epoch is hidden."""
        if run.is_first:
            with writing("TensorBoardLogger: argument `folder`", self.folder):
                self._writer = self._make(str(self.folder), purge_step=run.step + 1 if run.step else None)

    def on_step(self, run: Run) -> None:
        """Write a step, if it is time to."""
        if self._writer is not None and self.every_steps is not None and run.step % self.every_steps == 0:
            for name, value in run.last_step().items():
                self._writer.add_scalar(f"step/{name}", value, run.step)

    def on_epoch(self, run: Run) -> None:
        """Write an epoch."""
        if self._writer is not None:
            for name, value in epoch_numbers(run).items():
                self._writer.add_scalar(name, value, run.step)
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class LivePlot(Callback):
    """Draw the ELBO, validation and metrics in a notebook while the fit goes on.

    Args:
        every_epochs: Epochs after which it is drawn anew.

    Raises:
        ModuleNotFoundError: If matplotlib or IPython is not installed.
    """

    def __init__(self, every_epochs: int = 1) -> None:
        try:
            from IPython.display import Image, display
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ModuleNotFoundError(
                "LivePlot needs IPython and matplotlib: pip install ipython matplotlib"
            ) from error
        if not is_integer(every_epochs) or every_epochs < 1:
            raise ValueError(f"LivePlot: argument `every_epochs` must be an integer at least 1; got {every_epochs!r}")
        self.every_epochs, self._display, self._image, self._figure = every_epochs, display, Image, Figure
        self._shown: Any = None

    def on_fit_start(self, run: Run) -> None:
        """Begin a new figure."""
        self._shown = None

    def on_epoch(self, run: Run) -> None:
        """Draw, if it is time to."""
        if run.is_first and (run.epoch % self.every_epochs == 0 or run.stopped or run.epoch == run.num_epochs):
            file = io.BytesIO()
            self.figure(run).savefig(file, format="png", dpi=160)
            image = self._image(file.getvalue(), format="png", retina=True)  # sharp on screens with small pixels
            if self._shown is None:
                self._shown = self._display(image, display_id=True)
            else:
                self._shown.update(image)

    def figure(self, run: Run) -> Any:
        """Return the figure: the ELBO and the validation data in nats per row, then each metric, then mean lengths."""
        result, epochs = run.result, range(1, run.epoch + 1)
        panels = [("nats per row", {"ELBO": result.elbo, "validation": result.validation_log_likelihood})]
        panels += [(name, {name: values}) for name, values in result.metrics.items()]
        if result.mean_length:
            panels.append(("mean length, units", dict(list(result.mean_length.items())[:8])))
        figure = self._figure(figsize=(4 * len(panels), 2.8), layout="constrained")
        for axes, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, values in lines.items():
                if len(values) == run.epoch:
                    axes.plot(epochs, values, label=name)
            axes.set(xlabel="epoch", ylabel=label)
            if len(lines) > 1:
                axes.legend(frameon=False)
        return figure
