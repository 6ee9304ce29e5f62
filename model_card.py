"""The README.md of a Hub repository: what it holds, how to use it, how it was made.

A card is front matter (YAML that the Hub reads) and a body. We own the part of the body between two markers and a few
keys of the front matter; whatever else an author wrote stays as it is when a subject is pushed again.

Names, phrases and metadata come from subject files, and so from strangers: they are escaped, never interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from .base_models import ARCHITECTURES, SD, Architecture

__multisubject_version__ = "0.1.0"

START = "<!-- multisubject: written by push_*_to_hub; text outside these two markers is yours -->"
END = "<!-- multisubject: end -->"
SAMPLES_FOLDER = "samples"

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*?$\n?", flags=re.DOTALL | re.MULTILINE)
_OURS = re.compile(re.escape(START) + ".*?" + re.escape(END), flags=re.DOTALL)

_TRAINING_ROWS = {
    "base_model": "base model",
    "base_model_revision": "base revision",
    "method": "method",
    "steps": "steps",
    "resolution": "resolution",
    "library_versions": "library versions",
    "license": "licence",
}


def subject_card(
    repo_id: str,
    subjects: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Sequence[str]] | None = None,
    existing: str | None = None,
    mirrors: Mapping[str, str] | None = None,
) -> str:
    """The card of a repository of subjects.

    Args:
        repo_id: `user/repo`.
        subjects: name -> header entry (`class_phrase`, `num_tokens`, `embed_dim`, `base_model` …) and `file`, all that
            the repository holds. Of a path, its name alone is shown.
        samples: name -> the prompts of its new sample pictures, in order; they replace the subject's former ones.
        existing: the repository's present README.md.
        mirrors: ids of bases that are gone -> ids to name instead.
    """
    front, body = _split(existing or "")
    bases = _bases(subjects.values(), mirrors or {})
    licenses = sorted({str(info["license"]) for info in subjects.values() if info.get("license")})
    phrases = sorted({str(info["class_phrase"]) for info in subjects.values()})

    widget = [entry for entry in front.get("widget") or [] if isinstance(entry, dict)]
    for name, prompts in (samples or {}).items():
        kept = [entry for entry in widget if not _shows(entry, name)]
        widget = kept + [
            {"text": prompt, "output": {"url": sample_path(name, index)}} for index, prompt in enumerate(prompts)
        ]
    front |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": _union(front.get("tags"), ["text-to-image", "diffusers", "multisubject", "residual-embedding"]),
        "instance_prompt": ", ".join(phrases),
    }
    if bases:
        front |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "adapter"}
    if licenses:
        front["license"] = licenses[0] if len(licenses) == 1 else "other"
    if widget:
        front["widget"] = widget
    kinds = {
        one: {name: info for name, info in subjects.items() if {*info["embed_dim"]} == {*one.text_encoders}}
        for one in ARCHITECTURES
    }
    kinds = {one: fitting for one, fitting in kinds.items() if fitting}
    sections = [
        f"# {repo_id.partition('/')[2]}",
        f"Personal subjects for {' and '.join(one.family for one in kinds)}, as residual embeddings: a few KB each, "
        "composed freely in one prompt and placed by a layout with `multisubject`, a diffusers pipeline.",
        *(["<Gallery />"] if widget else []),
        _contents(subjects),
        "## Use it" if len(kinds) == 1 else "## Use it\n\nSubjects of two families do not meet in one picture.",
        *(_usage(repo_id, one, fitting, mirrors or {}, alone=len(kinds) == 1) for one, fitting in kinds.items()),
        *(_training(name, info) for name, info in sorted(subjects.items())),
    ]
    return _join(front, body, "\n\n".join(sections))


def pipeline_card(repo_id: str, existing: str | None = None, architecture: Architecture = SD) -> str:
    """The card of a repository that holds the code of an architecture's pipeline."""
    front, body = _split(existing or "")
    front |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": _union(front.get("tags"), ["text-to-image", "diffusers", "multisubject", "custom-pipeline"]),
        "license": front.get("license", "apache-2.0"),
    }
    text = f"""# {repo_id.partition("/")[2]}

A diffusers pipeline for {architecture.family} that puts several of your own subjects in one picture, each where a
layout says.

## Use it

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "{architecture.example}", custom_pipeline="{repo_id}", trust_remote_code=True
)
pipe.load_subject("user/petrucci", name="petrucci")
pipe.load_subject("user/majesty", name="majesty")
image = pipe(
    "a photo of <petrucci> and <majesty> on the beach",
    layout={{"petrucci": (0.05, 0.1, 0.5, 1.0), "majesty": (0.5, 0.3, 0.95, 1.0)}},
).images[0]
```

`trust_remote_code=True` runs the Python files of this repository: read them first, and pin what you read with
`custom_revision="<commit>"`.

## Offline

With `HF_HUB_OFFLINE=1` diffusers cannot look up a repository by its id. Fetch it once while online, then hand over the
folder:

```python
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo_id}")  # the second time from the cache, without a network call
pipe = DiffusionPipeline.from_pretrained(
    "{architecture.example}", custom_pipeline=folder, trust_remote_code=True
)
```"""
    return _join(front, body, text)


def sample_path(name: str, index: int) -> str:
    """Where a subject's sample picture lies in its repository."""
    return f"{SAMPLES_FOLDER}/{name}-{index}.png"


def is_sample_path(path: str, name: str) -> bool:
    """Whether a path in a repository is that of one of a subject's sample pictures."""
    return re.fullmatch(rf"{SAMPLES_FOLDER}/{re.escape(name)}-\d+\.png", path) is not None


def _contents(subjects: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        f"| `{name}` | {_plain(info['class_phrase'])} | {info['num_tokens']} x "
        f"{' + '.join(map(str, info['embed_dim'].values()))} | {_plain(PurePath(info['file']).name)} |"
        for name, info in sorted(subjects.items())
    ]
    return "\n".join(["| subject | class phrase | tokens x width | file |", "|---|---|---|---|", *rows])


def _usage(
    repo_id: str,
    architecture: Architecture,
    subjects: Mapping[str, Mapping[str, Any]],
    mirrors: Mapping[str, str],
    alone: bool,
) -> str:
    """Code that draws the first two of an architecture's subjects, which may be `alone` in their repository."""
    names, bases = sorted(subjects)[:2], _bases(subjects.values(), mirrors)
    folder = subjects[names[0]].get("base_model") or ""  # a stranger's text: only a name goes into the code
    is_name = re.fullmatch(r"[\w.-]+", str(folder))
    base = bases[0] if bases else f"path/to/{folder if is_name else 'the/base/model'}"
    boxes = [(0.05, 0.2, 0.5, 1.0), (0.5, 0.2, 0.95, 1.0)]
    loads = "\n".join(f'pipe.load_subject("{repo_id}", name="{name}")' for name in names)
    prompt = "a photo of " + " and ".join(f"<{name}>" for name in names) + " on the beach"
    layout = ", ".join(f'"{name}": {box}' for name, box in zip(names, boxes, strict=False))
    # Not in the text: diffusers finds a published file's requirements with a regular expression, and would find it.
    import_line = f"from multisubject.{architecture.module} import {architecture.pipeline}"
    head = "" if alone else f"{architecture.family}: {', '.join(f'`{name}`' for name in sorted(subjects))}\n\n"
    return f"""{head}```python
{import_line}

pipe = {architecture.pipeline}.from_pretrained("{base}")
{loads}
image = pipe(
    "{prompt}",
    layout={{{layout}}},  # xmin, ymin, xmax, ymax in fractions of the picture
).images[0]
```"""


def _bases(infos: Iterable[Mapping[str, Any]], mirrors: Mapping[str, str]) -> list[str]:
    """Hub ids of the subjects' base models, sorted."""
    named = {info["base_model"] for info in infos if _is_hub_id(info.get("base_model"))}
    return sorted({mirrors.get(base, base) for base in named})


def _training(name: str, info: Mapping[str, Any]) -> str:
    rows = []
    for key, label in _TRAINING_ROWS.items():
        value = info.get(key)
        if key == "base_model" and not _is_hub_id(value):
            continue  # a folder of the author's machine tells nobody anything
        if isinstance(value, Mapping):
            value = ", ".join(f"{library} {version}" for library, version in value.items())
        if value not in (None, ""):
            rows.append(f"| {label} | {_plain(value)} |")
    lines = [f"## How `{name}` was trained", "", "| | |", "|---|---|", *rows] if rows else []
    scores = info.get("scores")
    if isinstance(scores, Mapping) and scores:
        lines += ["", f"### What `{name}` scored", "", "| score | value |", "|---|---|"]
        lines += [f"| {_plain(score)} | {_plain(value)} |" for score, value in scores.items()]
    return "\n".join(lines)


def _plain(text: object) -> str:
    """A stranger's text as plain words in a Markdown table: no markup, link or HTML survives."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[:300])
    return re.sub(r"[\\`*_{}\[\]()#+!|~$<>&]|:(?=//)", lambda special: f"&#{ord(special[0])};", line)


def _is_hub_id(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 96 and _HUB_ID.fullmatch(value) is not None


def _shows(entry: Mapping[str, Any], name: str) -> bool:
    """Whether a widget entry shows a sample picture of this subject."""
    output = entry.get("output")
    url = output.get("url") if isinstance(output, Mapping) else None
    return isinstance(url, str) and is_sample_path(url, name)


def _union(first: object, second: Sequence[str]) -> list[str]:
    """An author's list of tags, with ours behind it."""
    return [*dict.fromkeys([*(str(tag) for tag in (first if isinstance(first, list) else [])), *second])]


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's front matter and its body."""
    import yaml

    match = _FRONT_MATTER.match(card)
    if match is None:
        return {}, card
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(
            f"the repository's README.md has front matter that is not YAML; mend it first. {error}"
        ) from None
    if front is not None and not isinstance(front, dict):
        raise ValueError("the repository's README.md has front matter that is not a mapping; mend it first.")
    return dict(front or {}), card[match.end() :]


def _join(front: Mapping[str, Any], body: str, ours: str) -> str:
    """Front matter and body, with our part of the body replaced, or put in front of what an author wrote."""
    import yaml

    ours = f"{START}\n\n{ours}\n\n{END}"
    if _OURS.search(body):
        body = _OURS.sub(lambda _: ours, body, count=1)
    else:
        body = "\n".join(filter(None, [ours, body.lstrip()]))
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{body.strip()}\n"
