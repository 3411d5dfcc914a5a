"""Where a run's numbers go while it runs: metrics.jsonl, TensorBoard, a progress bar, a writer of your own.

The one idea is `MetricWriter`: anything with `write(step, metrics)` and `close()` can be handed to the
training loop, so a tracker that pgdist does not know is a class of ten lines, and "no writer" is
`NullWriter`, not a special case.

The names that pgdist writes, each a number; docs/telemetry.md defines them:

    train/loss  train/learning_rate  train/grad_norm  train/masked_rows  train/truncated_rows
    train/examples_per_second  train/tokens_per_second  train/tokens_per_second_per_device  train/mfu
    validation/loss  validation/token_accuracy  validation/<metric of the task, such as exact_match>
    memory/peak_bytes
    time/step_seconds  time/data_wait_seconds  time/host_wait_seconds  time/compile_seconds
    time/checkpoint_seconds  time/evaluation_seconds  time/loading_seconds

A `time/...` value is the seconds spent on that since it was last written, and no second belongs to two of
them: their sums over a run are the shares that the report shows.
"""

from pgdist.telemetry.progress import ProgressBar
from pgdist.telemetry.writers import JsonlWriter, MetricWriter, MultiWriter, NullWriter, TensorBoardWriter

__all__ = ["JsonlWriter", "MetricWriter", "MultiWriter", "NullWriter", "ProgressBar", "TensorBoardWriter"]
