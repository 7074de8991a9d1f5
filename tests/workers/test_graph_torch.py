"""The graph of persisted values: PyTorch."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import numpy as np
import pytest
from graph_help import SCRIPT, read, round_trip, script

from spark_workers.scripts.graph import NeedsInitializer, dump, load

torch: Any = pytest.importorskip("torch")
torch.set_num_threads(1)
nn: Any = torch.nn
schedulers: Any = torch.optim.lr_scheduler


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 1))


class Odd(nn.Module):  # type: ignore[misc]
    """A model that cannot be pickled."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.embed = nn.Linear(40, width, bias=False)
        self.head = nn.Linear(width, 40, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(40)
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.act = lambda x: x * 2

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.act(self.embed(x))))


def train(model: Any, optimizer: Any, steps: int, first: int = 0, scheduler: Any = None) -> list[Any]:
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, model[0].in_features if isinstance(model, nn.Sequential) else 40, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(loss.detach())
        elif scheduler is not None:
            scheduler.step()
        losses.append(loss.detach())
    return losses


def same_bits(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Identity and aliasing


def test_the_optimizer_holds_the_parameters_of_the_model_and_not_copies() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2)
    for order in (("model", "optimizer"), ("optimizer", "model")):
        parts = {"model": model, "optimizer": optimizer}
        values = round_trip({key: parts[key] for key in order})
        held = values["optimizer"].param_groups[0]["params"]
        assert all(mine is its for mine, its in zip(values["model"].parameters(), held, strict=True))
        assert set(values["optimizer"].state) == set(held)


def test_tied_weights_and_views_stay_tied() -> None:
    weight = nn.Parameter(torch.randn(50, 50))
    first, second = nn.Linear(50, 50), nn.Linear(50, 50)
    first.weight = second.weight = weight
    values = round_trip({"first": first, "second": second, "row": weight.detach()[3], "t": weight.detach().t()})
    assert values["first"].weight is values["second"].weight
    values["row"][0] = 99
    assert values["first"].weight[3, 0] == 99 == values["t"][0, 3]
    storages = {values[key].untyped_storage()._cdata for key in ("row", "t")}
    assert storages == {values["first"].weight.untyped_storage()._cdata}


@pytest.mark.parametrize("size", [10, 5000])
def test_numpy_and_torch_share_memory_in_both_directions(size: int) -> None:
    array, tensor = np.zeros(size), torch.zeros(size)
    back = round_trip(
        {"from": torch.from_numpy(array[2:]), "array": array, "tensor": tensor, "numpy": tensor[1:].numpy()[::2]}
    )
    back["from"][0] = 1
    back["numpy"][0] = 2
    assert back["array"][2] == 1
    assert back["tensor"][1] == 2


def test_loaded_tensors_lie_in_the_given_memory() -> None:
    dumped = dump({"tensor": torch.arange(2000, dtype=torch.int32)})
    memory = memoryview(bytearray(dumped.buffers[0]))
    loaded: Any = load(dumped.stream, [memory], dumped.keys, dumped.offsets).values["tensor"]
    loaded[5] = -7
    assert memory.cast("i")[5] == -7


def test_a_second_round_trip_is_as_good_as_the_first() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    values = round_trip(round_trip({"model": model, "optimizer": optimizer}))
    assert same_bits(train(model, optimizer, 3), train(values["model"], values["optimizer"], 3))


# Kinds of tensors

FP8 = [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu") if hasattr(torch, name)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(40, 40).t(),
        lambda: torch.randn(40, 40)[::3, 5:],
        lambda: torch.randn(3).expand(5, 3),
        lambda: torch.randn(2000, dtype=torch.bfloat16),
        *(lambda dtype=dtype: torch.randn(40).to(dtype) for dtype in FP8),
        lambda: torch.randn(30, dtype=torch.complex64).conj(),
        lambda: torch.randn(30, dtype=torch.complex64).conj().imag,
        lambda: torch.tensor(3.5),
        lambda: torch.empty(0),
        lambda: torch.empty(3, 0, dtype=torch.int8),
        lambda: torch.tensor([True, False]),
        lambda: torch.ones(5, dtype=torch.uint16),
        lambda: torch.quantize_per_tensor(torch.randn(50), 0.1, 3, torch.quint8),
        lambda: torch.quantize_per_channel(torch.randn(4, 5), torch.rand(4) + 1, torch.zeros(4), 0, torch.qint8),
        lambda: torch.eye(50).to_sparse(),
        lambda: torch.eye(50).to_sparse_csr(),
        lambda: torch.eye(50).to_sparse_bsc((5, 5)),
        lambda: torch.randn(3, requires_grad=True),
        lambda: torch.eye(3).to_sparse().requires_grad_(),
        lambda: torch.eye(3).to_sparse_csr().requires_grad_(),
        lambda: nn.Parameter(torch.randn(3), requires_grad=False),
        *(lambda dtype=dtype: torch.randn(40).to(dtype).requires_grad_() for dtype in FP8),
    ],
)
def test_any_tensor_comes_back_as_it_was(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantisation and compressed layouts warn at their making
        tensor = make()
        back = round_trip({"tensor": tensor})["tensor"]
        assert type(back) is type(tensor)
        names = ("dtype", "shape", "layout", "device", "requires_grad", "is_quantized")
        assert [getattr(back, name) for name in names] == [getattr(tensor, name) for name in names]
        assert back.is_conj() == tensor.is_conj()
        assert back.is_neg() == tensor.is_neg()
        if tensor.layout is torch.strided and tensor.numel():
            assert back.stride() == tensor.stride()
        numbers = [one.detach().dequantize() if one.is_quantized else one.detach().to_dense() for one in (tensor, back)]
        plain = torch.complex64 if tensor.is_complex() else torch.float32
        assert torch.equal(numbers[0].to(plain), numbers[1].to(plain))


def test_a_nested_tensor_comes_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)])
        back = round_trip({"tensor": tensor})["tensor"]
        assert [one.tolist() for one in back.unbind()] == [[1, 1], [0, 0, 0]]


def test_storages_themselves_are_kept() -> None:
    tensor = torch.arange(3000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        typed = tensor.storage()
    values = round_trip({"typed": typed, "untyped": tensor.untyped_storage(), "tensor": tensor})
    values["tensor"][0] = 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert values["typed"][0] == 5
    assert values["untyped"].nbytes() == 12_000


def test_meta_tensors_and_storages_are_kept_without_memory() -> None:
    tensor = torch.empty(10**9, device="meta")
    values = round_trip({"tensor": tensor, "storage": tensor.untyped_storage()})
    assert values["tensor"].device.type == "meta"
    assert values["storage"].nbytes() == 4 * 10**9


def test_small_things_of_torch_are_kept() -> None:
    values = {"a": torch.float16, "b": torch.device("cpu"), "c": torch.Size([1, 2]), "d": torch.strided}
    assert round_trip(values) == values


def test_attributes_of_parameters_are_kept() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.group = "slow"
    assert round_trip({"parameter": parameter})["parameter"].group == "slow"


def test_a_generator_goes_on_where_it_was() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    values = round_trip({"generator": generator, "again": [generator]})
    assert values["again"][0] is values["generator"]
    assert torch.equal(torch.rand(9, generator=generator), torch.rand(9, generator=values["generator"]))


def test_another_default_device_does_not_matter() -> None:
    dumped = dump({"tensor": torch.ones(2000), "small": torch.ones(2)})
    with torch.device("meta"):
        values: dict[str, Any] = read(dumped).values
        again = dump(values)
    assert values["tensor"].sum() == 2000
    assert again.dropped == ()


# Gradients


def test_gradients_are_carried_also_for_tensors_met_in_several_keys() -> None:
    model = net()
    loose = torch.ones(3, requires_grad=True)
    (loose * 2).sum().backward()
    model(torch.randn(16, 8)).sum().backward()
    values = round_trip({"model": model, "loose": loose, "grad": loose.grad})
    assert same_bits([p.grad for p in model.parameters()], [p.grad for p in values["model"].parameters()])
    assert values["loose"].grad is values["grad"]


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_gradient_with_a_history_is_carried_without_it() -> None:
    x = torch.ones(3, requires_grad=True)
    (x**2).sum().backward(create_graph=True)
    back = round_trip({"x": x})["x"]
    assert back.grad.tolist() == [2, 2, 2]
    x.grad = None  # a cycle that torch warns of


def test_a_tensor_with_gradient_history_drops_its_key_and_says_where() -> None:
    loss = (torch.ones(3, requires_grad=True) ** 2).sum()
    dumped = dump({"log": {"losses": [1, loss]}, "fine": 1})
    assert dumped.keys == ("fine",)
    assert dumped.dropped[0].path == 'log["losses"][1]'
    assert "gradient history" in dumped.dropped[0].reason


# Training goes on


def lambda_lr(optimizer: Any) -> Any:
    return schedulers.LambdaLR(optimizer, lambda epoch: 0.9**epoch)


SCHEDULERS = {
    "step": lambda optimizer: schedulers.StepLR(optimizer, 2, 0.5),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 10),
    "onecycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.1, total_steps=50),
    "plateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
    "lambda": lambda_lr,
    "multiplicative": lambda optimizer: schedulers.MultiplicativeLR(optimizer, lambda epoch: 0.9),
    "cyclic": lambda optimizer: schedulers.CyclicLR(optimizer, 0.01, 0.1, step_size_up=4, cycle_momentum=False),
    "warm": lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.LinearLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)], [3]
    ),
}
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True, amsgrad=True),
    "tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05)),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR of itself
@pytest.mark.parametrize("steps_before", [0, 1, 4])
@pytest.mark.parametrize("scheduler_name", SCHEDULERS)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(optimizer_name: str, scheduler_name: str, steps_before: int) -> None:
    def start() -> tuple[Any, Any, Any]:
        model = net()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        scheduler = SCHEDULERS[scheduler_name](optimizer)
        train(model, optimizer, steps_before, 0, scheduler)
        return model, optimizer, scheduler

    straight = start()
    expected = train(*straight[:2], 5, steps_before, straight[2])
    values = round_trip(dict(zip(("model", "optimizer", "scheduler"), start(), strict=True)))
    model, optimizer, scheduler = values.values()
    if isinstance(scheduler, NeedsInitializer):
        scheduler = scheduler.apply(SCHEDULERS[scheduler_name](optimizer))
    losses = train(model, optimizer, 5, steps_before, scheduler)  # a warning would be an error
    assert scheduler.optimizer is optimizer
    assert same_bits(losses, expected)
    assert same_bits(list(model.parameters()), list(straight[0].parameters()))
    assert torch.equal(torch.as_tensor(scheduler.get_last_lr()), torch.as_tensor(straight[2].get_last_lr()))


def test_a_scheduler_puts_all_hyper_parameters_back() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = lambda_lr(optimizer)
    train(model, optimizer, 3, 0, scheduler)
    optimizer.param_groups[0]["momentum"] = 0.7
    before = {name: held for name, held in optimizer.param_groups[0].items() if name != "params"}
    values = round_trip({"model": model, "optimizer": optimizer, "scheduler": scheduler})
    values = round_trip(values)  # never applied, dumped again
    group = values["optimizer"].param_groups[0]
    group["momentum"] = 0.1
    values["scheduler"].apply(lambda_lr(values["optimizer"]))
    assert {name: held for name, held in group.items() if name != "params"} == before


# Kept by parts, dropped


def odd_training() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Odd()
    model.norm.weight.requires_grad_(False)
    model.table.fill_(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    train(model, optimizer, 3)
    return model, optimizer


def test_a_module_with_a_lambda_is_kept_by_its_parameters_and_training_goes_on() -> None:
    straight = odd_training()
    expected = train(*straight, 4, 3)
    values = round_trip(dict(zip(("model", "optimizer"), odd_training(), strict=True)))
    values = round_trip(values)  # never applied, dumped again
    assert isinstance(values["model"], NeedsInitializer)
    fresh = Odd()
    fresh.norm.eval()
    model = values["model"].apply(fresh)
    assert model is fresh
    assert model.head.weight is model.embed.weight
    assert all(
        mine is its for mine, its in zip(model.parameters(), values["optimizer"].param_groups[0]["params"], strict=True)
    )
    assert model.norm.training
    assert not model.norm.weight.requires_grad
    assert model.table.tolist() == [4, 4, 4]
    assert same_bits(train(model, values["optimizer"], 4, 3), expected)


def test_parts_that_do_not_fit_are_refused_and_stay_whole() -> None:
    model, optimizer = odd_training()
    values = round_trip({"model": model, "optimizer": optimizer})
    with pytest.raises(RuntimeError, match="size mismatch"):
        values["model"].apply(Odd(width=20))
    with pytest.raises(TypeError, match="the initializer made a int"):
        values["model"].apply(3)
    again = round_trip(values)["model"].apply(Odd())
    assert torch.equal(again.embed.weight, model.embed.weight)
    assert not again.norm.weight.requires_grad


def test_a_hook_that_is_a_lambda_does_not_cost_the_model() -> None:
    model = net()
    model.register_forward_hook(lambda *_: None)
    loaded = round_trip({"model": model})["model"].apply(net(1))
    assert same_bits(list(loaded.parameters()), list(model.parameters()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_script_module_is_kept_by_parts() -> None:
    model = torch.jit.script(nn.Linear(30, 40))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    values = round_trip({"model": model, "optimizer": optimizer})
    loaded = values["model"].apply(torch.jit.script(nn.Linear(30, 40)))
    assert torch.equal(loaded.weight, model.weight)
    loaded(torch.ones(30)).sum().backward()
    values["optimizer"].step()
    assert not torch.equal(loaded.weight, model.weight)


def test_an_optimizer_of_a_lost_model_is_lost_too() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = lambda_lr(optimizer)
    dumped = dump(
        {"scheduler": scheduler, "optimizer": optimizer, "bundle": {"net": model, "lock": threading.Lock()}, "n": 1}
    )
    assert dumped.keys == ("n",)
    reasons = {dropped.key: dropped for dropped in dumped.dropped}
    assert reasons["bundle"].path == 'bundle["lock"]'
    assert "shares memory with 'bundle'" in reasons["optimizer"].reason
    assert "shares memory with" in reasons["scheduler"].reason


def test_the_path_to_a_part_of_a_module_reads_like_code() -> None:
    model = net()
    model[3].extra = (x for x in ())
    dumped = dump({"bundle": [model]})
    assert dumped.dropped[0].path == "bundle[0].3.extra"


def test_an_iterator_over_a_data_loader_costs_only_its_own_key() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(500, 8))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    iterator = iter(loader)
    next(iterator)
    dumped = dump({"data": data, "loader": loader, "iterator": {"it": iterator}})
    assert dumped.keys == ("data", "loader")
    (dropped,) = dumped.dropped
    assert (dropped.path, dropped.reason) == ('iterator["it"]', "_SingleProcessDataLoaderIter cannot be pickled")


def test_a_missing_class_of_a_model_leaves_the_optimizer_and_comes_back_with_it() -> None:
    source = f"""
import torch
class Net(torch.nn.Module):
    __module__ = {SCRIPT!r}
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(50, 50)
class Weight(torch.Tensor):
    __module__ = {SCRIPT!r}
"""
    with script(source) as module:
        model = module.Net()
        model.layer(torch.ones(50)).sum().backward()
        weight = torch.ones(2000).as_subclass(module.Weight).requires_grad_()
        weight.sum().backward()
        dumped = dump({"model": model, "weight": weight, "optimizer": torch.optim.Adam(model.parameters())})
        assert dumped.dropped == ()
    absent = read(dumped)
    assert set(absent.values) == {"optimizer"}
    again = dump({**absent.values, **absent.aside})
    assert again.dropped == ()
    with script(source):
        values: dict[str, Any] = read(again).values
    assert values["optimizer"].param_groups[0]["params"][0] is values["model"].layer.weight
    assert torch.equal(values["model"].layer.weight.grad, model.layer.weight.grad)
    assert type(values["weight"]).__name__ == "Weight"
    assert values["weight"].grad.sum() == 2000


def test_a_device_that_is_gone_sets_its_keys_aside_and_keeps_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("no device")

    tensor, array = torch.arange(3000.0), np.arange(4000.0)
    values = {"tensor": tensor, "array": array, "view": torch.from_numpy(array[2:])}
    dumped = dump(values)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "frombuffer", gone)
        absent = read(dumped)
    assert set(absent.values) == {"array"}
    assert "no device" in absent.unreadable[0].reason
    patched: Any = read(dump({**absent.values, **absent.aside})).values
    assert torch.equal(patched["tensor"], tensor)
    patched["view"][0] = -1
    assert patched["array"][2] == -1


def test_warnings_of_torch_reach_nobody() -> None:
    tensor = torch.ones(3, requires_grad=True)
    tensor.register_hook(lambda grad: grad)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        round_trip({"tensor": tensor, "storage": tensor.detach().untyped_storage()})
    assert seen == []


def test_a_storage_on_a_device_is_copied_once_and_made_anew_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the host's name changed, the memory of this machine is a device's."""
    monkeypatch.setattr("spark_workers.scripts.graph_reduce.HOST", "host")
    tensor = torch.arange(3000.0)
    alias = torch.from_dlpack(tensor)  # another storage at the same place
    dumped = dump({"tensor": tensor, "view": tensor[5:], "alias": alias})
    assert [one.nbytes for one in dumped.buffers] == [12_000]
    memory = memoryview(bytearray(dumped.buffers[0]))
    values: dict[str, Any] = load(dumped.stream, [memory], dumped.keys, dumped.offsets).values
    values["view"][0] = -1
    assert values["tensor"][5] == -1 == values["alias"][5]
    assert memory.cast("f")[5] == 5
    lost = dump({"bad": [tensor, lambda: 0], "view": tensor[5:]})
    assert [dropped.key for dropped in lost.dropped] == ["bad", "view"]


def test_rebuilt_sparse_tensors_are_not_held_by_torch() -> None:
    round_trip({"sparse": torch.eye(3).to_sparse()})
    assert torch._utils._sparse_tensors_to_validate == []


def test_what_shares_with_a_lost_value_says_so_even_if_it_has_faults_of_its_own() -> None:
    model, optimizer = odd_training()
    dumped = dump({"model": model, "optimizer": optimizer, "bundle": [model.embed.weight, lambda: 0]})
    assert dumped.keys == ()
    dropped = {one.key: one for one in dumped.dropped}
    assert dropped["model"].path == "model.embed.weight"
    assert dropped["model"].reason.startswith("shares memory with 'bundle'")
