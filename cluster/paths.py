"""Where the project's own data files are.

An editable install keeps ``deploy/`` beside the packages, so the project root is the parent of
the ``cluster`` package. Nothing else in the project computes such a path.
"""

from pathlib import Path


def project_root() -> Path:
    """The folder that holds ``cluster/``, ``actors/`` and ``deploy/``."""
    return Path(__file__).resolve().parent.parent


def default_spec() -> Path:
    """The spec that ``afflux up`` uses when none is given."""
    return project_root() / "deploy" / "specs" / "embedded.yaml"


def find_model(path: str, spec_file: Path | None = None) -> tuple[Path | None, list[Path]]:
    """Look for a checkpoint folder.

    A relative path is tried against the spec file's folder, then the working directory, then the
    project root, so that the embedded model is found from anywhere.

    Returns:
        the first folder that exists (or None), and every place that was tried, in order.
    """
    wanted = Path(path).expanduser()
    if wanted.is_absolute():
        tried = [wanted]
    else:
        bases = [spec_file.resolve().parent] if spec_file is not None else []
        tried = list(dict.fromkeys(b / wanted for b in [*bases, Path.cwd(), project_root()]))
    found = next((place for place in tried if place.is_dir()), None)
    return (found.resolve() if found else None), tried
