"""Tables of the terminal: a plan, the presets, numbers of samplers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from ..config import Config
from ..plan import ITERATIONS, Measured
from ..presets import PRESETS

if TYPE_CHECKING:
    from ..run.metrics import SamplerNumbers

GIB = 1 << 30


def preset_tables() -> Iterator[Table]:
    """Every preset's numbers, and where each comes from."""
    for name, preset in PRESETS.items():
        table = Table(title=f"{name}: {preset.about}", title_justify="left", title_style="bold")
        for column in ("setting", "value", "source"):
            table.add_column(column)
        for key, choice in preset.choices.items():
            table.add_row(key, str(choice.value), choice.source)
        yield table


def plan_table(config: Config, plan: Measured) -> Table:
    """What a run will take, line by line."""
    table = Table(title=f"{config.teacher}, preset {config.preset}", show_header=False)
    peak = "does not fit" if plan.peak is None else f"{plan.peak / GIB:.2f} GiB"
    memory = "GPU memory" if plan.device.type == "cuda" else "memory"
    rows = {
        "trained": plan.what,
        f"peak {memory}": f"{peak} of {plan.room / GIB:.1f} GiB",
        "of which weights": f"{plan.weights / GIB:.2f} GiB",
        "peak RAM": f"{plan.ram / GIB:.2f} GiB",
        "disk": f"{plan.disk / GIB:.2f} GiB of {plan.disk_room / GIB:.0f} GiB free",
        "an iteration": f"{plan.iteration:.2f} s (median of {ITERATIONS})",
        "pairs": _duration(plan.pairs) if config.needs_pairs else "none needed",
        f"the run, {config.steps} steps": _duration(plan.iteration * config.steps + plan.pairs),
        "fits": "yes" if plan.fits else "NO",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds % 60:.0f} s"


def numbers_table(columns: "dict[str, SamplerNumbers]") -> Table:
    """Samplers beside each other; two get a column of speed-up."""
    is_pair = len(columns) == 2
    table = Table(title="2,000 fresh samples, balanced classes")
    table.add_column("")
    for name, numbers in columns.items():
        table.add_column(f"{name} ({numbers.nfe} NFE)", justify="right")
    if is_pair:
        table.add_column("speed-up", justify="right")
    lines = [
        ("Fréchet distance to the data", "frechet_distance", "{:.3f}"),
        ("intra-class std ratio", "intra_class_std_ratio", "{:.3f}"),
        ("ms an image, batch 1", "ms_per_image_batch_1", "{:.3f}"),
        ("ms an image, batch 64", "ms_per_image_batch_64", "{:.4f}"),
    ]
    for title, key, form in lines:
        values = [getattr(numbers, key) for numbers in columns.values()]
        cells = [form.format(value) for value in values]
        if is_pair:
            cells.append(f"{values[0] / values[1]:.1f}x" if key.startswith("ms") else "")
        table.add_row(title, *cells)
    return table
