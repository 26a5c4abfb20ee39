"""Optimizers of all kinds: each goes on from a state and updates in backward exactly, or is refused beforehand."""

import importlib.util
import inspect
import json
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from library.errors import InputError
from library.training.engine.bf16_update import Bf16Update
from library.training.engine.fused_backward import FusedBackward
from library.training.engine.optimizers import ParameterGroup, choose_optimizer, make_lr_schedule, make_optimizer
from library.training.engine.precision import make_accelerator
from library.training.engine.sharding import shard
from library.training.engine.trials import check_exactness
from library.training.state.tensor_rows import saved_parts
from library.training.state.tree import pack, unpack

STEPS = 10  # of which so many are before the state
BEFORE = 4
ROOT_MEAN = ["relative_step=False", "scale_parameter=False"]
FEW = [
    ("AdamW", []), ("AdaFactor", ROOT_MEAN), ("AdaFactor", []), ("SGDNesterov", []), ("torch.optim.Adafactor", []),
    ("NAdam", []), ("ASGD", []), ("Lion", []), ("prodigyopt.Prodigy", []), ("prodigyopt.Prodigy", ["slice_p=3"]),
    ("dadaptation.DAdaptAdam", []), ("dadaptation.DAdaptLion", []), ("schedulefree.AdamWScheduleFree", []),
    ("schedulefree.AdamWScheduleFree", ["warmup_steps=5"]), ("schedulefree.RAdamScheduleFree", []),
    *((f"pytorch_optimizer.{name}", []) for name in ("AdaBelief", "Lamb", "Adan", "StableAdamW", "ADOPT", "SOAP")),
]  # fmt: skip


def others():
    """All further optimizers of the packages that are installed."""
    found = []
    for package in ("pytorch_optimizer", "dadaptation", "schedulefree"):
        if importlib.util.find_spec(package):
            module = importlib.import_module(package)
            kinds = (kind for _, kind in inspect.getmembers(module, inspect.isclass))
            found += [f"{package}.{kind.__name__}" for kind in kinds if issubclass(kind, torch.optim.Optimizer)]
    return sorted(set(found) - {name for name, _ in FEW})


ALL = [
    *(pytest.param(*one, id="-".join([one[0], *one[1]])) for one in FEW),
    *(pytest.param(name, [], id=name, marks=pytest.mark.all) for name in others()),
]
MODES = {"plain": {}, "in backward": {"in_backward": True}, "bf16": {"in_pieces": True}}


def model(bf16):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 4, 2, padding=1))
    return module.bfloat16() if bf16 else module


def groups_of(module):
    return [
        ParameterGroup("unet", list(module[0].parameters()), 1e-2),
        ParameterGroup("text_encoder1", list(module[3].parameters()), 1e-2),
    ]


def ask(name, arguments, bf16=False, **mode):
    plain = partial(make_optimizer, name, arguments=arguments)
    given = {"in_backward": False, "in_pieces": False, "sharding": "none", "averages": False, **mode}
    check_exactness(
        partial(plain, bf16=Bf16Update("stochastic", 0) if given["in_pieces"] else None), plain,
        groups_of(model(given["in_pieces"])), name, device=torch.device("cpu"), **given,
    )  # fmt: skip


def made(name, arguments, in_backward=False, in_pieces=False):
    AcceleratorState._reset_state(reset_partial_state=True)
    module = model(in_pieces)
    update = Bf16Update("stochastic", 0) if in_pieces else None
    make = partial(FusedBackward, max_grad_norm=0.0) if in_backward else partial(shard, "none")
    return make(
        make_accelerator("no"), module, groups_of(module),
        lambda groups, **construct: make_optimizer(name, groups, arguments, bf16=update, **construct),
        lambda optimizer: make_lr_schedule("linear", optimizer, STEPS, 0, 1, 1.0),
    )  # fmt: skip


def loss_of(module, step):
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(step))
    return module(inputs.to(next(module.parameters()).dtype)).float().square().mean() * (1 + step % 3)


def train(parallel, steps):
    for step in steps:
        parallel.backward(loss_of(parallel.module, step))
        parallel.step()
        parallel.schedule.step()
        parallel.zero_grad()
    return parallel


def saved(parallel):
    """What a state's files hold of it, and nothing that is still the run's own."""
    objects = {name: one.state_dict() for name, one in parallel.state_objects().items()}
    tensors, plain = pack({"parts": parallel.own_parts(), "objects": objects})
    return unpack({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(plain)))


def take_up(parallel, state):
    parallel.read_parts(saved_parts([state["parts"]]))
    for name, one in parallel.state_objects().items():
        one.load_state_dict(state["objects"][name])
    return parallel


def weights(parallel):
    return [parameter.detach() for parameter in parallel.parameters]


def by_itself(name, arguments):
    """Trained by the optimizer alone, in a plain loop."""
    module, choice = model(bf16=False), choose_optimizer(name, arguments)
    groups = [{"params": group.parameters, "lr": group.learning_rate} for group in groups_of(module)]
    optimizer = choice.kind(groups, **choice.keywords_at(1e-2))
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        loss_of(module, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in module.parameters()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "arguments"), ALL)
def test_what_is_accepted_goes_on_bit_for_bit(name, arguments, mode):
    """And trains as the optimizer does by itself, also where some parameters at a time are updated in backward."""
    package = name.partition(".")[0]
    if package == "Lion" or "." in name:
        pytest.importorskip({"Lion": "lion_pytorch"}.get(package, package))
    try:
        ask(name, arguments, **MODES[mode])
    except InputError as error:
        assert name.rpartition(".")[2] in str(error)
        assert mode != "plain" or (name, arguments) not in FEW, error
        return
    whole = train(made(name, arguments, **MODES[mode]), range(STEPS))
    state = saved(train(made(name, arguments, **MODES[mode]), range(BEFORE)))
    resumed = train(take_up(made(name, arguments, **MODES[mode]), state), range(BEFORE, STEPS))
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    if mode != "bf16":
        assert all(map(torch.equal, weights(whole), by_itself(name, arguments)))


class CountsInItself(torch.optim.SGD):
    """Steps by a number that is neither in a state nor in a group."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad / self.count


class Draws(torch.optim.SGD):
    """Adds noise of torch's generator."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * torch.randn_like(parameter)


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("CountsInItself", {}, r"go on from a training state exactly, because.*\(attributes count\)"),
        ("Draws", {}, "go on from a training state exactly, because.*or draws random numbers"),
        ("prodigyopt.Prodigy", {"in_backward": True}, "--fused_backward_pass updates some parameters at a time"),
        ("prodigyopt.Prodigy", {"in_pieces": True}, "--full_bf16 updates some parameters at a time"),
        ("prodigyopt.Prodigy", {"sharding": "zero1"}, "--sharding=zero1 has each process update its share"),
        ("dadaptation.DAdaptAdam", {"sharding": "oss"}, "--sharding=oss has each process update its share"),
        ("schedulefree.AdamWScheduleFree", {"averages": True}, "--use_ema averages weights, and"),
        ("schedulefree.AdamWScheduleFree", {"sharding": "zero1"}, "exchanges all weights for saving"),
        ("pytorch_optimizer.AdaHessian", {}, "it cannot step here"),
    ],
)
def test_what_could_not_be_exact_is_refused_with_its_reason(name, mode, message):
    if "." in name:
        pytest.importorskip(name.partition(".")[0])
    else:
        name = f"{__name__}.{name}"
    with pytest.raises(InputError, match=message):
        ask(name, [], **mode)


def test_trying_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    with pytest.raises(InputError):
        check_exactness(
            lambda groups: Draws(groups[0].parameters, lr=0.1), lambda groups: Draws(groups[0].parameters, lr=0.1),
            [ParameterGroup("unet", [nn.Parameter(torch.zeros(2))], 0.1)], "Draws", in_backward=True, in_pieces=False,
            sharding="none", averages=False, device=torch.device("cpu"),
        )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["DAdaptAdam", "DAdaptSGD", "DAdaptLion"])
def test_an_estimate_over_all_numbers_is_no_update_by_element(name):
    pytest.importorskip("dadaptation")
    assert not choose_optimizer(f"dadaptation.{name}", []).by_element


def test_updates_by_element_are_found_by_trying():
    kinds = {name: choose_optimizer(name, []).by_element for name in ("AdamW", "SGD", "RMSprop", "NAdam", "Adagrad")}
    assert all(kinds.values()), kinds
    assert not choose_optimizer("AdaFactor", ROOT_MEAN).by_element
    assert not choose_optimizer("torch.optim.Adafactor", []).by_element


def test_what_is_saved_are_the_weights_to_use_and_training_goes_on_with_its_own():
    schedulefree = pytest.importorskip("schedulefree")
    parallel = train(made("schedulefree.AdamWScheduleFree", []), range(BEFORE))
    peer, before = model(bf16=False), [weight.clone() for weight in weights(parallel)]
    optimizer = schedulefree.AdamWScheduleFree(
        [{"params": group.parameters, "lr": 1e-2} for group in groups_of(peer)], lr=1e-2
    )
    optimizer.train()
    for step in range(BEFORE):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        loss_of(peer, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    with parallel.evaluated():
        assert all(map(torch.equal, weights(parallel), peer.parameters()))
        assert not all(map(torch.equal, weights(parallel), before))
    assert all(map(torch.equal, weights(parallel), before))
