"""`diffusion-jax report`: one page on a run, with its pictures, curves and measures, as a file that stands alone.

`report.html` holds all that it shows: it can be sent, kept and opened anywhere. `train` and `evaluate` write it too.
"""

import base64
import inspect
import json
import shlex
import struct
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from diffusion_jax import charts, summary, training
from diffusion_jax.command import leave, run_command
from diffusion_jax.command_parser import CommandParser
from diffusion_jax.config.parts import constructor
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import defaults
from diffusion_jax.places import ENTRIES
from diffusion_jax.reading import read_json
from diffusion_jax.shards import write_whole

REPORT = "report.html"

CAPTIONS = {
    "samples.png": "Samples of the trained model.",
    "denoising.png": "Samples on their way: noise on the left, the sample on the right.",
    "predictions.png": "What the model predicted the sample to be, at the same moments.",
}
"""What pictures in a workdir show. Curves are drawn anew."""

DURING = {"samples": "During training", "validation": "Prompts of the validation"}
"""Pictures that are drawn every so many steps, by the beginning of their names."""

DRAWN_HERE = ("loss.png", "loss_by_time.png")

MOST_PICTURE = 8 * 2**20
"""Bytes of a picture; larger ones are named and not shown."""

CURVES = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "steps_per_second": "steps per second",
    "mfu": "share of the peak (MFU)",
}
"""Figures of the log that have a chart of their own."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --quiet: #5d6875; --line: #e3e7ec; --page: #f5f6f8; --card: #fff;
  --accent: #2f6fde; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --quiet: #9aa5b1; --line: #323a45; --page: #12161b;
  --card: #1b2027; --accent: #7aa7f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .4rem; }
.sub { color: var(--quiet); margin: .2rem 0 1.2rem; overflow-wrap: anywhere; }
.grid2 { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.grid3 { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); }
.tiles { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; min-width: 0; }
.tile { padding: .7rem .9rem; } .tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--quiet); font-size: .85rem; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.pictures.series { grid-template-columns: repeat(auto-fill, minmax(min(45%, 220px), 1fr)); margin-top: 1rem; }
.pictures figure { margin: 0; } .pictures img { max-width: 100%; height: auto; border-radius: 6px; display: block;
  margin: 0 auto; }
img.small { width: 100%; image-rendering: pixelated; max-width: 520px; }
figcaption { color: var(--quiet); font-size: .85rem; margin-top: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; } .scroll { overflow-x: auto; }
td, th { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; } th { color: var(--quiet); font-weight: 500; min-width: 6.5rem; }
th { max-width: 14rem; overflow-wrap: anywhere; }
td.number { font-variant-numeric: tabular-nums; } td { overflow-wrap: anywhere; }
code, pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem;
  margin: .3rem 0 .9rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--accent); }
"""


def write_report(workdir: Path | str, output: Path | str | None = None) -> Path:
    """Writes the page on the run in `workdir`, by default as `report.html` there; returns where it is.

    Raises InvalidInput where `workdir` is not the folder of a run.
    """
    path = Path(workdir) / REPORT if output is None else Path(output)
    write_whole(path, report_page(Path(workdir)))
    return path


def report_page(workdir: Path) -> str:
    """The page as HTML, without references to anything outside of it."""
    config = training.read_config(workdir)
    log = workdir / "metrics.jsonl"
    records = training.logging.read_log(log) if log.is_file() else []
    run = _read(workdir / summary.RUN)
    measured = _measures(_read(workdir / "metrics.json"))
    name = workdir.resolve().name
    sections = {
        "": _tiles(records, run),
        "Samples": _pictures(workdir),
        "Measured on samples": _table(measured, number=True),
        "Loss": _losses(records),
        "Training": _curves(records),
        "Model and data": _table({name: text for name, text in run.get("summary", {}).items() if name != "workdir"}),
        "Settings": _settings(config),
        "Environment": _table({**run.get("environment", {}), "started": run.get("started", "")} if run else {}),
        "Commands": _commands(workdir, run),
    }
    body = "".join(
        (f"<h2>{escape(title)}</h2>" if title else "") + content for title, content in sections.items() if content
    )
    about = _about(config, records, workdir)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{charts.STYLE}</style></head><body><main><h1>{escape(name)}</h1>"
        f'<p class="sub">{escape(about)}</p>{body}</main></body></html>\n'
    )


def _read(path: Path) -> Any:
    """A JSON object of the run; nothing where there is none or it is damaged."""
    try:
        found = read_json(str(path)) if path.is_file() else {}
    except InvalidInput:
        return {}
    return found if isinstance(found, Mapping) else {}


def _about(config: Any, records: Sequence[Any], workdir: Path) -> str:
    wanted = config.get("train", {}).get("steps")
    done = max([*training.saved_steps(workdir), *(record["step"] for record in records)], default=0)
    model, data = (str((config.get(name) or {}).get("call", "")) for name in ("model", "data"))
    what = " on ".join(filter(None, (model, data)))
    if not wanted:
        return what
    return f"{what} · {done:,} of {wanted:,} steps" + ("" if done < wanted else ", finished")


def _last(records: Sequence[Any], field: str) -> float | None:
    return next((record[field] for record in reversed(records) if isinstance(record.get(field), float)), None)


def _tiles(records: Sequence[Any], run: Any) -> str:
    rates = sorted(record["examples_per_second"] for record in records if "examples_per_second" in record)
    tiles = {
        "training loss": _last(records, "loss"),
        "held-out loss": _last(records, "validation/loss"),
        "examples per second": rates[len(rates) // 2] if rates else None,
        "of the peak (MFU)": _last(records, "mfu"),
    }
    shown = {
        name: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}" for name, value in tiles.items() if value is not None
    }
    if isinstance(tiles["of the peak (MFU)"], float):
        shown["of the peak (MFU)"] = f"{tiles['of the peak (MFU)']:.1%}"
    model = str(run.get("summary", {}).get("model", ""))
    if " parameter" in model:
        shown["parameters"] = model.partition(" parameter")[0].split()[-1]
    boxes = "".join(
        f'<div class="card tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in shown.items()
    )
    return f'<div class="tiles">{boxes}</div>' if boxes else ""


def _pictures(workdir: Path) -> str:
    """Pictures of the last commands, and how samples changed during training."""
    found = [path for path in sorted(workdir.glob("*.png")) if path.name not in DRAWN_HERE]
    found.sort(key=lambda path: [*CAPTIONS, path.name].index(path.name))
    shown = [(path, CAPTIONS.get(path.name, path.stem.replace("_", " "))) for path in found]
    series = []
    for kind, when in DURING.items():
        during = sorted((workdir / "pictures").glob(f"{kind}_{'[0-9]' * 7}.png"))
        picked = [during[round(i * (len(during) - 1) / 3)] for i in range(4)] if len(during) > 4 else during
        series += [(path, f"{when}, step {int(path.stem.rpartition('_')[2]):,}.") for path in picked]
    return _gallery(shown, "pictures") + _gallery(series, "pictures series")


def _gallery(shown: Sequence[tuple[Path, str]], kind: str) -> str:
    figures = "".join(f'<div class="card"><figure>{_image(path, caption)}</figure></div>' for path, caption in shown)
    return f'<div class="{kind}">{figures}</div>' if figures else ""


def _image(path: Path, caption: str) -> str:
    told = f"<figcaption>{escape(caption)}</figcaption>"
    if path.stat().st_size > MOST_PICTURE:
        return f"<p>{escape(path.name)} is too large to be shown here.</p>{told}"
    content = path.read_bytes()
    width = struct.unpack(">I", content[16:20])[0] if len(content) > 24 else 0
    kind = ' class="small"' if width < 420 else ""
    uri = base64.b64encode(content).decode()
    return f'<img{kind} alt="{escape(caption, quote=True)}" src="data:image/png;base64,{uri}">{told}'


def _card(title: str, chart: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3>{chart}</div>' if chart else ""


def _points(records: Sequence[Any], field: str) -> charts.Curve:
    found = [(record["step"], record[field]) for record in records if isinstance(record.get(field), float)]
    return [step for step, _ in found], [value for _, value in found]


def _losses(records: Sequence[Any]) -> str:
    curves = {"training": _points(records, "loss"), "held out": _points(records, "validation/loss")}
    by_step = charts.line_chart(curves, x_label="step", y_label="loss", log=True)
    curves, label = training.by_time.latest_curves(records), "t, from clean data (0) to noise (1)"
    by_time = charts.line_chart(curves, x_label=label, y_label="loss", log=True, marked=True, x_range=(0.0, 1.0))
    cards = _card("Loss by step", by_step) + _card("Loss by timestep, at the end of training", by_time)
    return f'<div class="grid2">{cards}</div>' if cards else ""


def _curves(records: Sequence[Any]) -> str:
    def chart(field: str, title: str) -> str:
        points = _points(records, field)
        if len(points[0]) < 2:
            return ""
        drawn = charts.line_chart(
            {title: points}, x_label="step", y_label=title, log=field == "grad_norm",
            y_range=(0.0,) if field in training.logging.TIMINGS else (),
        )  # fmt: skip
        return _card(title, drawn)

    cards = "".join(chart(field, title) for field, title in CURVES.items())
    fields = dict.fromkeys(name for record in records for name in record)
    rest = [
        name for name in fields
        if name not in {*CURVES, "step", "loss", "validation/loss", "examples_per_second"} and "t=" not in name
    ]  # fmt: skip
    others = "".join(chart(field, field) for field in rest)
    more = f'<details><summary>All other figures of the log</summary><div class="grid3">{others}</div></details>'
    return (f'<div class="grid3">{cards}</div>' if cards else "") + (more if others else "")


def _measures(found: Any, prefix: str = "") -> dict[str, str]:
    """Numbers of `metrics.json` by their names, also of nested ones; what identifies the samples is left out."""
    values = {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            values |= {} if name == "samples" else _measures(value, f"{prefix}{name}.")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            values |= {f"{prefix}{name}": str(value)} if isinstance(value, str) else {}
        else:
            values[f"{prefix}{name}"] = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return values


def _table(rows: Mapping[str, Any], number: bool = False) -> str:
    kind = ' class="number"' if number else ""
    lines = "".join(
        f"<tr><th>{escape(name.replace('_', ' ') if number else name)}</th><td{kind}>{escape(str(value))}</td></tr>"
        for name, value in rows.items() if value != ""
    )  # fmt: skip
    narrow = ' style="max-width: 36rem"' if number else ""
    return f'<div class="card scroll"{narrow}><table>{lines}</table></div>' if lines else ""


def _settings(config: Any) -> str:
    """What differs from the defaults, and the whole config behind it."""
    rows = {}
    plain = defaults(config.get("train", {}).get("steps", 1), config.get("train", {}).get("batch_size", 1)).to_dict()
    for name in sorted(config, key=lambda name: (*ENTRIES, "metrics", name).index(name)):
        rows |= changed_settings(name, config[name], plain.get(name))
    lines = "".join(
        f"<tr><th>{escape(name).replace('.', '.<wbr>')}</th><td><code>{escape(text)}</code></td></tr>"
        for name, text in rows.items()
    )
    whole = escape(json.dumps(config, indent=2))
    return (
        f'<div class="card"><div class="scroll"><table>{lines}</table></div>'
        f"<details><summary>The whole config, with defaults</summary><pre>{whole}</pre></details></div>"
    )


def changed_settings(name: str, entry: Any, default: Any) -> dict[str, str]:
    """Rows of an entry of a config: plain values and calls where they differ from the default."""
    if isinstance(entry, Mapping) and "call" in entry:
        return {} if entry == default else {name: call_in_words(entry)}
    if isinstance(entry, Mapping):
        known = default if isinstance(default, Mapping) else {}
        steps = ("steps", "batch_size") if name == "train" else ()
        return {
            row: text
            for key, value in entry.items()
            for row, text in changed_settings(f"{name}.{key}", value, None if key in steps else known.get(key)).items()
        }
    return {} if _listed(entry) == _listed(default) else {name: _value(entry)}


def _listed(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def call_in_words(entry: Mapping[str, Any]) -> str:
    """`models.dit(preset='S/2', width=96)`: a call with the arguments that differ from its defaults."""
    try:
        # Code from elsewhere is not imported for a page.
        parameters = {} if ":" in entry["call"] else inspect.signature(constructor(entry["call"])).parameters
    except InvalidInput:
        parameters = {}
    given = []
    for key, value in entry.items():
        default = parameters[key].default if key in parameters else inspect.Parameter.empty
        if key != "call" and _listed(value) != _listed(default):
            given.append(f"{key}={_value(value)}")
    return f"{entry['call']}({', '.join(given)})"


def _value(value: Any) -> str:
    if isinstance(value, Mapping) and "call" in value:
        return call_in_words(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value)


def _commands(workdir: Path, run: Any) -> str:
    commands = {"Train on, or again from here": run.get("command", "")} | {
        "Draw samples": f"diffusion-jax sample --workdir={shlex.quote(str(workdir))}",
        "Measure them": f"diffusion-jax evaluate --workdir={shlex.quote(str(workdir))}",
        "Write this page again": f"diffusion-jax report --workdir={shlex.quote(str(workdir))}",
    }
    told = "".join(
        f"<h3>{escape(what)}</h3><pre>{escape(command)}</pre>" for what, command in commands.items() if command
    )
    return f'<div class="card">{told}</div>'


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "report",
        description=__doc__,
        epilog="example: diffusion-jax report --workdir=out/digits",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the folder of a training run")
    parser.add_argument("--output", type=Path, help="where the page goes (default WORKDIR/report.html)")
    arguments = parser.parse_args(argv)
    print(f"Wrote {write_report(arguments.workdir, arguments.output)}")


if __name__ == "__main__":
    leave(run_command(main))
