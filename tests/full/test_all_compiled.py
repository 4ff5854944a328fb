"""torch.compile, torch.fx, torch.export and TorchScript beneath the bridge: every way, cold and
warm (`make test-all`)."""

import pytest

from tests.compiled_cases import BODY, KINDS, PROLOGUE, run


@pytest.mark.parametrize("kind", KINDS)
def test_values_x_compiled(kind, tmp_path):
    made, plain = KINDS[kind]
    done = run(PROLOGUE + BODY.format(made=made, plain=plain, kind=kind), tmp_path)
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr[-3000:]
