"""One HTML page, and Markdown, of all records."""

import argparse
from pathlib import Path

from rich.console import Console

from .common import add_json, prepare, source_directory

RECORDS = Path(__file__).parent.parent / "records"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_json(parser)
    parser.add_argument(
        "records",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="records, or directories of them; the committed ones, unless stated",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append a summary there")


def main(arguments: argparse.Namespace) -> int:
    """Write what was asked for, Markdown to standard output if nothing was."""
    prepare("cpu")
    from ..html_report import page_of, render
    from ..records import fingerprints, write_json
    from ..report_records import collect
    from ..specs import KERNELS

    absent = [path for path in arguments.records if not path.exists()]
    if absent:
        raise SystemExit(f"there is no {', '.join(map(str, absent))}")
    found = collect(arguments.records or [RECORDS])
    page = page_of(found, fingerprint=fingerprints(source_directory(), KERNELS))
    try:
        markdown = render(page, "report.md")
        if arguments.html:
            arguments.html.parent.mkdir(parents=True, exist_ok=True)
            arguments.html.write_text(render(page, "report.html"))
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        with arguments.markdown.open("a") as file:
            file.write(markdown)
    if arguments.json:
        tiles = [[tile.title, tile.value, tile.note, tile.state] for tile in page.tiles]
        write_json(arguments.json, {"command": "report", "good": page.good, "tiles": tiles})
    told = Console(stderr=True, soft_wrap=True)
    for path in filter(None, (arguments.html, arguments.markdown)):
        told.print(f"wrote {path}", markup=False, highlight=False)
    if not (arguments.html or arguments.markdown):
        Console(soft_wrap=True).print(markdown, markup=False, highlight=False)
    return 0
