"""Test accuracy over training: a panel a setting, a line a unit."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dia_diffusion.evaluation.curves import save_figure, scale_images, style
from dia_diffusion.sweeps.accuracies import Row

TITLE_WIDTH = 50
"""Letters in a line of a panel's title."""


def draw_accuracies(rows: Sequence[Row], path: Path) -> None:
    """The mean over seeds, and each seed thin behind it. Where all runs diverged there is no line, and no panel."""
    settings = list(dict.fromkeys(row.setting for row in rows if row.accuracies)) or [rows[0].setting]
    units = list(dict.fromkeys(row.unit for row in rows))
    figure = Figure(figsize=(max(6.4, 1 + 4.4 * len(settings)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        sizes: set[int | None] = set()
        for row in (row for row in rows if row.setting == setting):
            look = style(units.index(row.unit))
            curves = [dict(result.curve) for result in row.results if result.accuracy is not None and result.curve]
            sizes |= {result.recipe["train.batch_size"] for result in row.results}
            shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
            for curve in curves if len(curves) > 1 else []:
                panel.plot(list(curve), list(curve.values()), color=look["color"], linewidth=0.6, alpha=0.4)
            if shared:
                means = [float(np.mean([curve[images] for curve in curves])) for images in shared]
                panel.plot(shared, means, label=row.unit, **look)
        scale_images(panel, sizes)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.grid(alpha=0.25)
        panel.set_title(fill(setting, TITLE_WIDTH), fontsize="small")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
    panels[0].set_ylabel("test accuracy")
    save_figure(figure, path)
