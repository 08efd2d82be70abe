"""edgeskip doctor."""

from __future__ import annotations

import dataclasses
import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Show what this machine has, what will work here, and the command that mends what will not."""
    from edgeskip.runtime.doctor.examine import examine

    report = examine()
    try:
        from edgeskip.runtime.doctor.report import print_doctor
        from edgeskip.runtime.terminal import console
    except ImportError:  # without rich the JSON says as much
        as_json = True
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        print_doctor(report, console())
