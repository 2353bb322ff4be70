"""What the library uses of torch and Pyro that they do not promise is listed, is there, and does what we use it for."""

import ast
import inspect
import pkgutil
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.contrib.gp.kernels import RBF
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_vnd import _compat
from pyro_vnd._compat import (
    QuietModule,
    check_mean_field_requirement,
    give_local_params,
    keep_own_params,
    mask_of_rows,
    only_plain_code,
    quiet_lookups,
    recall,
    remember,
)

ROOT = Path(__file__).parents[1]
LISTED = sorted(set(re.findall(r"`((?:torch|pyro)\.[\w.]+)`", _compat.__doc__)))
VERSIONS = f"torch {torch.__version__}, Pyro {pyro.__version__}"
HELP = f"under {VERSIONS}: see what pyro_vnd/_compat.py says of it, and where `git grep` finds it in pyro_vnd"


def guide():
    made = AutoNormal(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    made()
    return made


def local_module():
    with pyro.settings.context(module_local_params=True):
        module = PyroModule()
        module.p = PyroParam(torch.zeros(1))
    return module


# Objects that have what is no attribute of their classes.
EXAMPLES = {
    "pyro.distributions.MaskedDistribution": lambda: dist.Normal(0.0, 1.0).mask(True),
    "pyro.infer.autoguide.AutoGuide": guide,
    "pyro.infer.Trace_MMD": lambda: pyro.infer.Trace_MMD(RBF(1)),
    "pyro.nn.PyroModule": local_module,
    "torch.distributions.Distribution": lambda: dist.Normal(0.0, 1.0),
    "torch.nn.Module": lambda: nn.Linear(1, 1),
}


@pytest.mark.parametrize("path", LISTED)
def test_what_is_listed_is_there(path):
    owner, _, name = path.rpartition(".")
    for example, make in EXAMPLES.items():
        if path.startswith(f"{example}._"):
            found = make()
            for part in path.removeprefix(f"{example}.").split("."):
                assert hasattr(found, part), f"`{path}` is gone {HELP}"
                found = getattr(found, part)
            return
    assert hasattr(pkgutil.resolve_name(owner), name), f"`{path}` is gone {HELP}"


def test_a_sample_keeps_what_was_attached_to_it_until_it_changes():
    sample = remember(torch.zeros(2), "how it was made")
    assert recall(sample) == "how it was made"
    assert recall(sample.clone()) is recall(torch.zeros(2)) is None
    sample.add_(1.0)
    assert recall(sample) is None, f"`torch.Tensor._version` no longer counts changes in place {HELP}"


def test_torch_says_when_only_plain_code_will_do():
    seen = []
    torch.func.vmap(lambda x: seen.append(only_plain_code()) or x)(torch.zeros(2))
    torch.func.grad(lambda x: seen.append(only_plain_code()) or x)(torch.tensor(0.0))
    assert seen == [True, True], f"`torch._C._are_functorch_transforms_active` no longer sees `torch.func` {HELP}"
    assert not only_plain_code()


def test_a_module_given_a_store_keeps_its_parameters_to_itself():
    module = PyroModule()
    give_local_params(module)
    with pyro.settings.context(module_local_params=True):
        module.p = PyroParam(torch.zeros(1))
        assert module.p == 0
    message = f"`pyro.nn.PyroModule._pyro_context.param_state` is no longer where a module keeps its own {HELP}"
    assert list(pyro.get_param_store()) == [], message


def test_a_module_that_owns_its_parameters_leaves_the_store_alone():
    class Holder(QuietModule):
        def __init__(self):
            super().__init__()
            self.p = PyroParam(torch.zeros(1))

        def forward(self):
            return self.p

    pyro.clear_param_store()
    theirs = pyro.param("p", torch.ones(1))
    module = Holder()
    keep_own_params([module, None])
    for called in (module, whole := Holder()):
        if called is whole:
            whole.part, whole.forward = module, lambda: whole.part.p
        site = poutine.trace(called).get_trace().nodes["p" if called is module else "part.p"]
        message = f"a `PyroModule` is no longer called within `_pyro_context`, or the store was left changed {HELP}"
        assert site["value"] == 0, message
        assert dict(pyro.get_param_store()) == {"p": theirs}, message
        # Which SVI asks for after the call; a `scope` of the store would have taken it away.
        assert site["value"].unconstrained() is module.p_unconstrained
    pyro.clear_param_store()


def test_a_quiet_module_hands_out_its_nets_without_a_word():
    class Holder(QuietModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)

        def forward(self):
            return self.net.in_features

    module = Holder()
    loud = poutine.trace(module).get_trace()
    with quiet_lookups():
        quiet = poutine.trace(module).get_trace()
    assert loud.param_nodes == ["net$$$weight", "net$$$bias"]
    assert quiet.param_nodes == [], f"`pyro.nn.PyroModule.__getattr__` finds its nets elsewhere {HELP}"
    assert quiet.nodes["_RETURN"]["value"] == 1


def test_the_rows_that_count_are_found():
    rows = torch.tensor([True, True, False])
    law = dist.Normal(torch.zeros(3), 1.0).mask(rows)
    assert mask_of_rows(law) is rows, f"`pyro.distributions.MaskedDistribution._mask` is no longer the mask {HELP}"


def test_the_warning_of_another_order_is_given():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    def reversed_guide():
        pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(0.0, 1.0))

    traces = [poutine.trace(part).get_trace() for part in (model, reversed_guide)]
    with pytest.warns(UserWarning, match="Failed to verify mean field restriction"):
        check_mean_field_requirement(*traces)


def is_private(name):
    promised = {"_asdict", "_fields", "_make", "_replace"}  # of named tuples, by Python
    return name.startswith("_") and not name.startswith("__") and name not in promised


def own_names(tree):
    """Private names that a file defines: functions, variables, fields, and attributes of `self` or of a new object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def used_names(tree):
    """Private attributes and imports that a file uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("pyro_vnd"):
            yield from (alias.name for alias in node.names)
            yield from node.module.split(".")


def inherited_names(namespace):
    """Private names that the classes of a module share with the classes of torch and Pyro from which they are made."""
    for cls in namespace.values():
        if inspect.isclass(cls) and cls.__module__ == namespace["__name__"]:
            own = set(re.findall(r"\b_\w+", inspect.getsource(cls)))
            bases = [base for base in cls.__mro__ if base.__module__.startswith(("torch.", "pyro."))]
            for base in (base for base in bases if not base.__module__.startswith("torch._C")):
                attributes = re.findall(r"self\.(_\w+)\b[^=\n]*=", inspect.getsource(base))
                yield from own & {*vars(base), *attributes}


def test_what_is_used_is_listed():
    files = sorted((ROOT / "pyro_vnd").rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in files}
    own = {name for tree in trees.values() for name in own_names(tree)}
    used = {}
    for path, tree in trees.items():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        foreign = set(used_names(tree)) - own | set(inherited_names(vars(pkgutil.resolve_name(module))))
        used |= {name: path.relative_to(ROOT).as_posix() for name in foreign if is_private(name)}
    listed = {part for path in LISTED for part in path.split(".")}
    missing = {name: path for name, path in sorted(used.items()) if name not in listed}
    assert not missing, f"private names of torch or Pyro that are not in the list of pyro_vnd/_compat.py: {missing}"
    text = "".join(path.read_text().replace(_compat.__doc__, "") for path in files)
    stale = [path for path in LISTED if not re.search(rf"\b{path.rpartition('.')[2]}\b", text)]
    assert not stale, f"listed in pyro_vnd/_compat.py, and used nowhere: {stale}"


def test_a_quiet_module_hands_out_parts_and_runs_as_ever():
    class Holder(QuietModule):
        def __init__(self):
            super().__init__()
            self.part = PyroModule[nn.Linear](2, 2)

        def forward(self, x):
            return self.part(x)

    with pyro.settings.context(module_local_params=True):
        holder, x = Holder(), torch.ones(1, 2)
        expected = holder(x)
        with quiet_lookups():
            assert holder.part is dict(holder.named_children())["part"]
            torch.testing.assert_close(holder(x), expected)
