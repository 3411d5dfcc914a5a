"""Scores of a run's last predictions by task, for data whose records have a field `task`.

python tools/score_tasks.py runs/tiny_pretrain
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pgdist.evaluate.metrics import detection_iou, exact_match

METRICS = {"detect": ("mean IoU", detection_iou)}


def main(workdir: Path) -> None:
    """Prints task, number of examples, metric and its mean."""
    path = sorted((workdir / "predictions").glob("step_*.jsonl"))[-1]
    scores = collections.defaultdict(list)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        _, metric = METRICS.get(row["task"], ("exact match", exact_match))
        scores[row["task"]].append(metric(row["prediction"], row["suffix"]))
    print(path)
    for task, values in sorted(scores.items()):
        name, _ = METRICS.get(task, ("exact match", exact_match))
        print(f"{task:<8} {len(values):5d} examples  {name:<11}  {sum(values) / len(values):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
