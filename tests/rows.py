"""Logits of rows that are verified together or one by one; as a program, hashes of both, by a number of threads."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from edgeskip.runtime.backends.cpu_session import OrtCpuSession
from edgeskip.runtime.bundle.graphs import HEAD_ROWS
from edgeskip.runtime.bundle.manifest import read_bundle
from edgeskip.runtime.decoding.rounds import Round, prefill_round, verification_round


def logits_by_calls(session, manifest, position, lengths):
    """The logits of rows from a position on, verified in calls of these lengths after random rows; [rows,V]."""
    split, size, random = manifest.split(), manifest.architecture.hidden_size, np.random.default_rng(0)

    def run(round_, first):
        bound = session.bind(round_)
        bound.start(first)
        bound.wait()

    session.write("inputs_embeds", random.standard_normal((position, size)))
    run(prefill_round(split, position, last=False, early_exit=False), 0)
    states, found = random.standard_normal((HEAD_ROWS, size)), []
    for rows in lengths:
        done = sum(map(len, found))
        session.write(split.exit_states, states[done : done + rows])
        calls = tuple(call for call in verification_round(split, rows - 1).calls if call.verifies)
        run(Round(calls, rows=rows, num_drafts=0, num_targets=rows), position + done)
        found.append(session.read_logits(rows))
    return np.concatenate(found)


if __name__ == "__main__":
    bundle = read_bundle(Path(sys.argv[1]))
    with OrtCpuSession(bundle, threads=int(sys.argv[2])) as session:
        for lengths in ([1] * HEAD_ROWS, [HEAD_ROWS]):
            print(hashlib.sha256(logits_by_calls(session, bundle.manifest, 40, lengths).tobytes()).hexdigest())
