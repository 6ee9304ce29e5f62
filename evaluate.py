"""Folders of generated pictures -> scores: do they show the prompt, the subjects themselves, each in its region?

    python evaluate.py --pictures results --references petrucci=data/petrucci majesty=data/majesty

- CLIP-T: cosine of prompt and picture. CLIP-I, DINO: mean cosine of the picture and a subject's reference pictures.
- own, leak: a detector finds each subject by its class phrase; its crop against the crops of its own references, and
  against those of the picture's other subjects. What was not found has neither: read them beside `found`.
- IoU, centre: that detection and the region that the layout asked for; 0 for what was not found.

One thing in a picture is a detection of one subject at most.

Prompts, class phrases and layouts are read from the PNGs of `generate_images.py`. **The tests run this on tiny models
of random weights: it has never been run with released weights, nor on a GPU.**
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import multisubject
from multisubject.evaluation.arguments import EvaluateArguments, EvaluationError, read_pairs
from multisubject.generation.arguments import DataclassParser, parse_arguments
from multisubject.generation.console import quiet_imports
from multisubject.pictures import png_bytes
from multisubject.subject_file import write_atomically


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with status 2 and one message where arguments, pictures or models are wrong."""
    args: EvaluateArguments = parse_arguments(_parser(), argv)
    with quiet_imports():
        from multisubject.evaluation.pictures import Notes, check_output, find_pictures, read_pictures
        from multisubject.evaluation.results import evaluation_sheet, markdown_table, summaries
        from multisubject.evaluation.scores import evaluate
    notes = Notes()
    try:
        # 1. Read what there is to compare, before anything heavy
        references = {
            name: find_pictures(f"--references {name}", folder, notes, recursive=False)
            for name, folder in read_pairs("--references", args.references).items()
        }
        pictures = read_pictures(args, references, notes)
        output = Path(str(args.output))
        check_output(output)
        # 2. Score it
        records = evaluate(pictures, references, args, notes)
    except (EvaluationError, ImportError) as error:  # some processors want a package that is not installed, and say so
        sys.exit(_error(error))

    # 3. Tell, before anything can fail
    summary = summaries(records)
    print(markdown_table("folder", summary["folders"]))
    if summary["subjects"]:
        print(f"\n{markdown_table('subject', summary['subjects'])}")
    print(f"\n{len(pictures)} pictures, {len(notes.damaged)} damaged ones left out. Mean [95 % bootstrap interval].")
    if left_out := [name for name in ("clip_model", "dino_model", "detector", "references") if not getattr(args, name)]:
        print(f"Without --{', --'.join(left_out)}: their scores are left out.")

    # 4. Write
    about = {"made_by": "multisubject-evaluate", "version": multisubject.__version__, "arguments": asdict(args)}
    result = {**about, "damaged": notes.damaged, "warnings": notes.warnings, **summary, "pictures": records}
    try:
        write_atomically(output, json.dumps(result, indent=1, allow_nan=False).encode())
        write_atomically(output.with_suffix(".png"), png_bytes(evaluation_sheet(pictures, records)))
    except OSError as error:
        message = (
            f"--output is {str(output)!r}; writing it and its contact sheet failed: {error}. Expected a folder with "
            "room for both. The means are above; for every picture's scores, run it again with another."
        )
        sys.exit(_error(EvaluationError(message)))
    print(f"scores: {output}\ncontact sheet: {output.with_suffix('.png')}")


def _error(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _parser() -> DataclassParser:
    return DataclassParser(
        EvaluateArguments,
        prog="multisubject-evaluate",
        description="Scores for folders of generated pictures: prompt (CLIP-T), subjects (CLIP-I, DINO), each subject "
        "where a detector finds it (own, leak), and the layout (IoU, centre).",
        epilog="multisubject-evaluate --pictures results --references petrucci=data/petrucci majesty=data/majesty, or "
        "for any pictures: multisubject-evaluate --pictures photos --prompt 'a photo of a person' --references "
        "petrucci=data/petrucci --class_phrases petrucci=person. Tested with tiny models of random weights only, never "
        "with released ones.",
    )


if __name__ == "__main__":
    main()
