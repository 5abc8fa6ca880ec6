"""What a process has imported: a stage only what it needs, and the package nothing heavy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages

import minigpt
import minigpt.errors
from minigpt.client.pipeline import Pipeline
from transport import aead


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, minigpt; print([name for name in ('numpy', 'Crypto', 'msgpack') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_the_package_shows_what_it_has_and_all_of_its_errors() -> None:
    assert set(dir(minigpt)) == set(minigpt.__all__) >= {"load", "Pipeline"}
    errors = {
        name
        for name, value in vars(minigpt.errors).items()
        if isinstance(value, type) and value.__module__ == "minigpt.errors"
    }
    assert errors <= set(minigpt.__all__)
    readme = (ROOT / "README.md").read_text()
    for name in errors:
        assert getattr(minigpt, name) is getattr(minigpt.errors, name)
        assert f"{name}`" in readme


def test_a_stage_has_not_imported_numpy_when_its_options_are_read() -> None:
    """--threads must be set before: BLAS counts its threads when NumPy is imported."""
    code = "import sys, minigpt.stage.__main__; print('numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "False"
    assert (ROOT / "minigpt" / "stage" / "__init__.py").read_text() == ""


def test_numpy_may_be_imported_first_and_is_warned_of_only_where_that_costs_something() -> None:
    code = """
import numpy, warnings
warnings.simplefilter("error")
import minigpt
from minigpt.engine import blas
minigpt.load("tiny")
print(blas.control().get(), flush=True)
with minigpt.Pipeline.local("tiny", stages=1):
    minigpt.load("tiny")
"""

    def run(**variables: str) -> tuple[str, str]:
        environment = {"PATH": "/usr/bin:/bin", **variables}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, text=True, cwd=ROOT, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    said = run()[1]
    assert said.count("for 29 ms after each product") == said.count("Import minigpt before numpy") == 1
    assert run(OPENBLAS_THREAD_TIMEOUT="20")[1] == ""  # nothing came too late
    for threads in ("1", "2"):  # the number can still be set
        assert run(MINIGPT_THREADS=threads)[0] == f"{threads}\n"


@pytest.mark.parametrize("hidden", ["transport.py", "attest.py", "transport/__init__.py"])
def test_a_users_file_that_hides_a_package_of_ours_is_named(tmp_path: Path, hidden: str) -> None:
    file = tmp_path / hidden
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    (tmp_path / "script.py").write_text("import minigpt")
    said = f"{file} hides minigpt's own package {hidden.partition('/')[0].removesuffix('.py')}: rename it, or start"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in (("script.py",), ("-m", "minigpt", "generate", "The")):
        run = subprocess.run([sys.executable, *command], text=True, cwd=tmp_path, capture_output=True, env=environment)
        assert said in run.stderr
        assert run.returncode == 1
        assert ("Traceback" in run.stderr) == (command[0] == "script.py")


def test_a_cpu_without_any_feature_that_numpy_dispatches_to_generates() -> None:
    simd = np.show_config(mode="dicts")["SIMD Extensions"]
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(simd.get("found", []))}
    code = "import minigpt, numpy; print(numpy.show_config(mode='dicts')['SIMD Extensions'].get('found'));"
    code += "print(''.join(token.text for token in minigpt.load('tiny').generate('The capital of France is')))"
    run = subprocess.run([sys.executable, "-c", code], text=True, cwd=ROOT, capture_output=True, env=environment)
    assert run.stdout.startswith("None\n Paris"), run.stderr


WATCHED = """
import json, sys, threading
def tell():
    sys.stdin.readline()
    print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), flush=True)
    sys.stdin.read()
threading.Thread(target=tell, daemon=True).start()
from minigpt.stage.__main__ import main
arguments = [word for word in sys.argv[1:] if word != '--until-eof']
sys.exit(main(arguments))
"""


def test_a_running_stage_has_imported_only_what_it_needs(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start(1, python=("-c", WATCHED))
        stages.start(0, python=("-c", WATCHED))
        with Pipeline.connect(stages.bytes, allow_mock=True) as pipeline:
            assert len(list(pipeline.generate([1, 2, 3], max_tokens=4))) == 4
            pipeline.status()
        for process in stages.processes.values():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            imported = set(json.loads(process.stdout.readline()))
            outside = {name for name in imported if not name.startswith("_") or name in ("_cffi_backend",)}
            outside -= set(sys.stdlib_module_names)
            known = {"attest", "minigpt", "transport", "numpy", "safetensors", "msgpack", "Crypto"}
            known |= {"sitecustomize"} & set(sys.modules)  # Debian's Python has one, and this stage is started by hand
            known |= {"cryptography"} if aead.BACKEND == "cryptography" else set()  # the extra fast
            uses_cffi = {"cffi", "_cffi_backend", "pycparser", "cython_runtime"}  # pycryptodome does, where it is there
            assert outside - known <= uses_cffi
