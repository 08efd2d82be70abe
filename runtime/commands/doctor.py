"""edgeskip doctor."""

from __future__ import annotations

from pathlib import Path

import click

from edgeskip.runtime.commands.options import json_option
from edgeskip.runtime.commands.reports import check_writable, on_stdout, write_json


@click.command()
@json_option
def doctor(json_path: Path | None) -> None:
    """Show what this machine has, what works here, and the command that mends what does not."""
    from edgeskip.runtime.doctor.examine import examine

    check_writable(json_path)
    report = examine()
    try:
        from edgeskip.runtime.doctor.report import print_doctor
        from edgeskip.runtime.terminal import console
    except ImportError:  # without rich the JSON says as much
        json_path = json_path or Path("-")
    else:
        if not on_stdout(json_path):
            print_doctor(report, console())
    write_json(json_path, report)
