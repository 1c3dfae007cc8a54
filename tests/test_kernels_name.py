"""The folder `kernels/` and Hugging Face's package `kernels` live side by side.

transformers probes for an importable `kernels` with a version when it is imported. Run from the
repository root, that must find the installed package if there is one, and nothing with a file or
a version if there is none (transformers then takes it as absent).
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_in_root(code: str, *path: Path) -> str:
    """Run code with the repository root first on sys.path, as `python -c` there does."""
    inserted = "".join(f"sys.path.append({str(p)!r}); " for p in path)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {inserted}{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_our_folder_is_no_package() -> None:
    code = "import kernels; print(kernels.__file__, hasattr(kernels, '__version__'))"
    assert run_in_root(code) == "None False"


def test_an_installed_package_of_that_name_wins(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.17.2"\n')
    code = "import kernels, lumen_kernels; print(kernels.__version__, lumen_kernels.__name__)"
    assert run_in_root(code, tmp_path) == "0.17.2 lumen_kernels"
