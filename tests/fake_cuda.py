"""A CUDA device for tests on machines without one: real values on the CPU, CUDA's rules about devices.

    with fake_cuda() as gpu:
        x = torch.ones(3, device="cuda")      # x.device is cuda:0, x.is_cuda, and its numbers are real
        x + torch.ones(3)                     # RuntimeError: Expected all tensors to be on the same device
        x.sum().item()                        # counted in gpu.syncs, by place in the code
    print(gpu.syncs, gpu.launches, gpu.peak)

A tensor "on cuda" is a wrapper whose metadata say cuda:0 and that holds a CPU tensor. A TorchDispatchMode takes every
ATen call below autograd and autocast, refuses what CUDA would refuse (mixed devices, CPU generators, CPU-only kernels),
runs the rest on the held tensors, and wraps what comes out. So autograd, autocast (bfloat16 for "cuda"), checkpointing,
fused AdamW and autograd.Function run as they would. Half-precision products are formed in float32 and rounded once, as
a tensor core does. What it cannot see: kernels themselves, streams and races, torch.compile, CUDA graphs, and speed.

syncs:    places at which the host waits for the device, {(kind, file:line): times}
launches: {ATen op: times}; views and allocations excluded: about one kernel each
bytes, flop: read and written, multiplied, by those launches (log: set it to a list to have them one by one)
sdpa:     {(kernels that could take it, shapes, strides): times}: cuDNN, the first on H100, plans anew for each
live, peak: bytes of "device" memory alive, exact at every op, without the allocator's rounding and fragmentation
shapes=True: float tensors hold no numbers (meta), for real models' sizes; what the host reads of them is ones.
"""

import collections
import contextlib
import math
import sys
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
WAITS = {
    aten._local_scalar_dense: "item",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten.equal: "equal",
    aten._unique2: "unique",
    aten.bincount: "bincount",
}
TOUCH = {aten.index, aten.index_put_, aten._index_put_impl_, aten.gather, aten.embedding}
MIXES = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_, aten.copy_, aten._to_copy, aten.set_}
FREE = {
    aten.detach,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._local_scalar_dense,
    aten.lift_fresh,
    aten.alias,
    aten._unsafe_view,
    aten._reshape_alias,
}


class Lease:
    """Counts a storage as device memory as long as some wrapper holds it."""

    def __init__(self, gpu, tensor):
        storage = tensor.untyped_storage()
        self.gpu, self.key, nbytes = gpu, storage._cdata, -(-storage.nbytes() // 512) * 512
        held = gpu.held.setdefault(self.key, [0, nbytes])
        held[0] += 1
        if held[0] == 1:
            gpu.live += nbytes
            gpu.peak = max(gpu.peak, gpu.live)
            if gpu.limit and gpu.live > gpu.limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes (fake)")

    def __del__(self):
        held = self.gpu.held.get(self.key)
        held[0] -= 1
        if not held[0]:
            self.gpu.live -= held[1]
            del self.gpu.held[self.key]


class CudaTensor(Tensor):
    """On cuda:0 for Python; for C++ a CPU tensor, so that autograd asks for no streams, and autocast is the
    CPU's. Shares its numbers with `inner`, a plain tensor that the mode computes with."""

    @staticmethod
    def __new__(cls, inner, gpu):
        self = (
            Tensor._make_subclass(cls, inner)
            if not inner.is_meta
            else Tensor._make_wrapper_subclass(
                cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=CPU
            )
        )
        self.inner, self.lease = inner, Lease(gpu, inner)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = property(lambda _: CUDA), property(lambda _: True), property(lambda _: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Gpu.current.call(func, args, kwargs or {})

    def to(self, *args, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        if device is None or device.type == "cuda":
            moved = self if dtype in (None, self.dtype) else aten._to_copy(self, dtype=dtype)
            return moved.clone() if moved is self and kwargs.get("copy") else moved
        with mock.patch.object(Gpu.current, "leaving", True):
            return aten._to_copy(self, dtype=dtype, device=CPU)

    def new_tensor(self, data, dtype=None, **_):
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def cpu(self):
        return self.to(CPU)

    def tolist(self):
        return self.cpu().tolist()

    def get_device(self):
        return 0

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **_):
        return f"cuda({self.inner!r})"

    def __deepcopy__(self, memo):
        with torch.no_grad():
            copy = self.detach().clone()
        copy.requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        return memo.setdefault(id(self), copy)


class Gpu(TorchDispatchMode):
    current = None

    def __init__(self, shapes=False, limit=0, total=80 * 2**30):
        super().__init__()
        self.shapes, self.limit, self.total = shapes, limit, total
        self.held, self.live, self.peak, self.log, self.leaving = {}, 0, 0, None, False
        self.reset()

    def reset(self):
        self.syncs, self.launches = collections.Counter(), collections.Counter()
        self.bytes, self.flop, self.seconds, self.sdpa, self.peak = 0, 0, 0.0, collections.Counter(), self.live

    def wait(self, kind):
        """Note that the host waits, and where: the nearest frame outside torch and this file."""
        frame = sys._getframe(2)
        while frame.f_back and (
            "/torch/" in (name := frame.f_code.co_filename) or name == __file__ or "contextlib" in name
        ):
            frame = frame.f_back
        self.syncs[kind, f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, kwargs or {})

    def refuse(self, func, why):
        raise RuntimeError(f"{why} (fake CUDA, in {func})")

    def call(self, func, args, kwargs):
        op = func.overloadpacket
        flat, spec = tree_flatten((args, kwargs))
        on_cuda = [x for x in flat if isinstance(x, CudaTensor)]
        on_cpu = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, CudaTensor) and x.device.type == "cpu"]
        target = next((x for x in flat if isinstance(x, torch.device)), None)
        if on_cuda and not self.leaving or target is not None and target.type == "cuda":
            target = CUDA  # "cpu" may come from C++, which takes the wrappers for CPU tensors
        if not on_cuda and target != CUDA:
            return func(*args, **{k: v for k, v in kwargs.items() if k != "pin_memory"})  # no pinned memory here

        # --- what CUDA refuses
        if on_cuda and on_cpu and op not in MIXES:
            scalars = torch.Tag.pointwise in func.tags or op in (
                aten.fill_,
                aten.masked_fill_,
                aten.masked_fill,
                aten.where,
            )
            if not scalars or any(x.dim() for x in on_cpu):
                where = [(str(x.device), tuple(x.shape)) for x in flat if isinstance(x, Tensor)]
                self.refuse(func, f"Expected all tensors to be on the same device, found cuda:0 and cpu, {where}")
        if any(word in str(func) for word in ("mkldnn", "quantized", "_pin_memory")):
            self.refuse(func, "Could not run with arguments from the 'CUDA' backend")
        if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in flat):
            self.refuse(func, "Expected a 'cuda' device type for generator but found 'cpu'")
        if func in (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out):
            a, b, out_dtype = args[-3:] if op is aten.mm else (*args[1:3], args[3])
            if (
                a.dtype != b.dtype
                or out_dtype != a.dtype
                and not (out_dtype == torch.float32 and a.dtype.itemsize == 2)
            ):
                self.refuse(func, f"out_dtype {out_dtype} of a product of {a.dtype} and {b.dtype}")

        # --- where the host waits
        if op in WAITS:
            self.wait(WAITS[op])
        if op in (aten._to_copy, aten.copy_):
            source, goal = (args[1], args[0].device) if op is aten.copy_ else (args[0], target)
            if source.device.type != goal.type:
                self.wait("to host" if goal.type == "cpu" else "to device")
        if op in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_):
            if not isinstance(args[0], CudaTensor):
                self.refuse(func, "indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            for i in args[1]:
                if i is not None and i.dtype in (torch.bool, torch.uint8):
                    self.wait("mask as index")
                elif i is not None and i.device.type == "cpu":
                    self.wait("index to device")
            if op is not aten.index and args[2].device.type == "cpu":
                self.wait("value to device")

        # --- run it on what the wrappers hold
        inner = {id(x.inner): x for x in on_cuda}
        shapes = self.shapes and any(x.inner.is_meta for x in on_cuda)
        raw = [
            x.inner if isinstance(x, CudaTensor) else CPU if isinstance(x, torch.device) and x.type == "cuda" else x
            for x in flat
        ]
        if shapes:
            raw = [
                x.to("meta")
                if isinstance(x, Tensor)
                and x.dtype != torch.bool
                and not x.is_meta
                and op is not aten.copy_
                and op is not aten._to_copy
                else x
                for x in raw
            ]
        a, k = tree_unflatten(raw, spec)
        a, k = list(a), dict(k)
        if shapes and op in (
            aten.index,
            aten.index_put_,
            aten._index_put_impl_,
        ):  # a mask has no count on meta: look at it
            a[1] = (
                [
                    y.to("meta")
                    for i in a[1]
                    if i is not None
                    for y in (i.nonzero().unbind(1) if i.dtype == torch.bool and not i.is_meta else (i,))
                ]
                if any(i is not None and i.dtype == torch.bool for i in a[1])
                else a[1]
            )
        out = self.run(func, op, a, k, shapes)
        self.count(func, op, a, raw, out)
        if op is aten._local_scalar_dense or not isinstance(out, (Tensor, tuple, list)):
            return out
        if target != CUDA:
            return torch.ones(out.shape, dtype=out.dtype) if out.is_meta else out

        def wrap(x):
            if not isinstance(x, Tensor):
                return x
            if self.shapes and x.is_floating_point() and not x.is_meta and id(x) not in inner:
                x = x.to("meta")
            return inner[id(x)] if id(x) in inner else CudaTensor(x, self)

        if func._schema.name.endswith("_") or "out" in kwargs:  # in place: what was given comes back
            given = kwargs.get("out", args[0])
            if isinstance(given, CudaTensor) and given.shape != given.inner.shape:
                raise NotImplementedError(f"{func} changed a shape in place")
            return given
        return tree_map(wrap, out)

    def run(self, func, op, args, kwargs, shapes):
        if op is aten._local_scalar_dense and args[0].is_meta:
            return args[0].dtype.type(1) if hasattr(args[0].dtype, "type") else {torch.bool: True}.get(args[0].dtype, 1)
        if shapes and op is aten.copy_:  # a number-less tensor takes or gives nothing
            return args[0]
        if shapes and op is aten._to_copy:
            kwargs.pop("device", None)
            return func(*args, **kwargs)
        if func in (aten.mm.dtype, aten.addmm.dtype):
            return (
                torch.mm(*(x.float() for x in args[:2]))
                if op is aten.mm
                else torch.addmm(args[0], args[1].float(), args[2].float(), **kwargs)
            )
        if func is aten.mm.dtype_out:
            return torch.mm(args[0].float(), args[1].float(), out=kwargs["out"])
        if func is aten.addmm.dtype_out:
            out = kwargs.pop("out")
            return torch.addmm(args[0], args[1].float(), args[2].float(), out=out, **kwargs)
        if op in PRODUCTS and not shapes and args[0].dtype.itemsize == 2 and "out" not in kwargs:
            return func(*(x.float() if isinstance(x, Tensor) else x for x in args), **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    def count(self, func, op, args, raw, out):
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if op in FREE or views:
            return
        self.launches[str(op).removeprefix("aten.")] += 1
        tensors = [x for x in raw if isinstance(x, Tensor)]
        results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        if op in TOUCH:  # not all of the operands, only what comes out or goes in
            small = args[2] if op in (aten.index_put_, aten._index_put_impl_) else out
            moved, flop = 2 * small.numel() * small.itemsize, 0
        else:
            moved, flop = sum(x.numel() * x.itemsize for x in tensors + results), 0
        if op in PRODUCTS:
            x, y = tensors[1:3] if op in (aten.addmm, aten.baddbmm) else tensors[:2]
            flop = 2 * x.numel() * y.shape[-1]
        if "flash_attention" in str(op):
            q, key = (tensors[0], tensors[1]) if "backward" not in str(op) else (tensors[1], tensors[2])
            flop = (10 if "backward" in str(op) else 4) * q.numel() * key.shape[-2]
            flop //= 2 if any(x is True for x in raw) else 1  # causal
        self.bytes, self.flop = self.bytes + moved, self.flop + flop
        if self.log is not None:
            self.log.append((str(op).removeprefix("aten."), moved, flop))


def to_indexed(plain):
    """Tensor.to, which would ask CUDA for its current device where none is named."""
    named = {"cuda": CUDA, torch.device("cuda"): CUDA}

    def to(self, *args, **kwargs):
        args = [named.get(x, x) if isinstance(x, (str, torch.device)) else x for x in args]
        return plain(self, *args, **{k: named.get(v, v) if k == "device" else v for k, v in kwargs.items()})

    return to


def attention(gpu, plain):
    """F.scaled_dot_product_attention: for fake CUDA tensors one kernel, and a note of which one CUDA would take."""

    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not isinstance(q, CudaTensor):
            return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) if x.dtype == torch.float32 else x for x in (q, k, v))
        half, group = q.dtype.itemsize == 2, q.shape[1] // k.shape[1]
        usable = {
            "cudnn": half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and k.shape[2] > 1,
            "flash": half and attn_mask is None,
            "efficient": all(x.stride(-1) == 1 for x in (q, k, v)),
        }
        gpu.sdpa["/".join(n for n in usable if usable[n]) or "math", tuple(q.shape), tuple(k.shape), k.stride()] += 1
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # as convert_boolean_attn_mask does
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
        if group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    return sdpa


@contextlib.contextmanager
def fake_cuda(**options):
    gpu, c = Gpu(**options), torch.cuda
    fakes = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *a, **k: True,
        "get_device_capability": lambda *a: (9, 0),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *a: gpu.wait("synchronize"),
        "mem_get_info": lambda *a: (gpu.total - gpu.live, gpu.total),
        "memory_allocated": lambda *a: gpu.live,
        "memory_reserved": lambda *a: gpu.live,
        "max_memory_allocated": lambda *a: gpu.peak,
        "reset_peak_memory_stats": lambda *a: setattr(gpu, "peak", gpu.live),
        "empty_cache": lambda: None,
    }
    patches = [mock.patch.object(c, name, fake) for name, fake in fakes.items()]
    patches.append(mock.patch.object(F, "scaled_dot_product_attention", attention(gpu, F.scaled_dot_product_attention)))
    patches.append(mock.patch("torch.utils._foreach_utils._foreach_supported_types", [Tensor, CudaTensor]))
    patches.append(
        mock.patch.object(
            torch,
            "autocast",
            lambda device_type, *args, plain=torch.autocast, **kwargs: plain(
                "cpu" if device_type == "cuda" else device_type, *args, **kwargs
            ),
        )
    )
    patches.append(mock.patch.object(Tensor, "to", to_indexed(Tensor.to)))
    grouped = torch._C._group_tensors_by_device_and_dtype
    patches.append(
        mock.patch.object(
            torch._C,
            "_group_tensors_by_device_and_dtype",
            lambda lists, indices=False: {
                (CUDA if isinstance(lists[0][0], CudaTensor) else device, dtype): found
                for (device, dtype), found in grouped(lists, indices).items()
            },
        )
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(mock.patch.object(Gpu, "current", gpu))
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes it on the host, and moves it
        stack.enter_context(gpu)
        yield gpu
