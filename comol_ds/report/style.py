"""What all pictures share: sizes, colors, ticks, panels, and their way into a file."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from comol_ds.report.modules import Group, shorten

WIDTH = 13.0  # inches; of 100 pixels each they fill a laptop's window
DPI = 150  # sharp where the screen or a printer has more pixels than that
RC = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a task's name may hold $
}
# Okabe and Ito's colors for every kind of color vision, without yellow, which is faint on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
SEQUENTIAL = "viridis"  # perceptually uniform
DIVERGING = "coolwarm"  # nearly equal steps in CIELAB: their standard deviation is 6 % of the mean, of RdBu 24 %
MAX_GROUPS = 12  # kinds of module that are drawn; the table has all
_LEVELS = 33  # odd: a diverging map has one color for zero
_TICK = 0.19  # inches between ticks along a side


def png(figure: Figure) -> bytes:
    """The picture as PNG with a palette, which takes a third of the bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor="white", pil_kwargs={"compress_level": 1})
    image = Image.open(drawn).convert("RGB")
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def color_map(name: str) -> Colormap:
    """Of few enough colors to survive in the palette; gray for NaN."""
    return colormaps[name].resampled(_LEVELS).with_extremes(bad="0.8")


def color_bar(figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str) -> Colorbar:
    """A thin bar beside all panels, as high as the figure."""
    height = figure.get_size_inches()[1]
    return figure.colorbar(
        image, ax=axes, label=label, extend="both", pad=0.01, aspect=height / 0.13, extendfrac=0.1 / height
    )


def grid(count: int, columns: int, panel: tuple[float, float], margin: float = 0.9) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels of at least panel = (width, height) inches, plus room for a color bar."""
    columns = min(columns, count)
    rows = -(-count // columns)
    width = min(WIDTH, columns * panel[0] + margin)
    figure = Figure(figsize=(max(width, 4.5), max(rows * (panel[1] + 0.45), 2.4)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, list(axes[:count])


def group_style(position: int) -> dict:
    """Line color and dash of the position-th kind of module, the same in every picture."""
    return {
        "color": COLORS[position % len(COLORS)],
        "linestyle": DASHES[position // len(COLORS) % len(DASHES)],
    }


def title_of(group: Group) -> str:
    return shorten(group.title, 32)


def tick_step(count: int, inches: float, room: float = _TICK) -> int:
    """1, 2, 5, 10, 20, ... so that ``count`` ticks with this step have ``room`` along ``inches``."""
    fitting = max(inches / room, 1)
    for step in (scale * unit for scale in (1, 10, 100, 1000) for unit in (1, 2, 5)):
        if count / step <= fitting:
            return step
    return count


def label_ticks(axis, labels: Sequence[str], inches: float, room: float = _TICK) -> None:
    """Ticks at as many of the cells 0, 1, ... as fit, with their labels."""
    step = tick_step(len(labels), inches, room)
    positions = range(0, len(labels), step)
    axis.set_ticks(positions, [shorten(labels[position], 22) for position in positions])


def write_cells(axes: Axes, text: np.ndarray, shade: np.ndarray, size: float = 6.5) -> None:
    """Text in every cell of a picture, white where ``shade`` (true: dark) says so."""
    for (row, column), word in np.ndenumerate(text):
        color = "white" if shade[row, column] else "black"
        axes.text(column, row, word, ha="center", va="center", fontsize=size, color=color, in_layout=False)
