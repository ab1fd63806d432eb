"""A CUDA device for tests on machines without one: real values on the CPU, CUDA's rules about devices.

    with fake_cuda() as gpu:
        x = torch.ones(3, device="cuda")      # x.device is cuda:0, x.is_cuda, and its numbers are real
        x + torch.ones(3)                     # RuntimeError: Expected all tensors to be on the same device
        x.sum().item()                        # counted in gpu.waits, by place in the code
    print(gpu.waits, gpu.launches, gpu.peak)

    python -m tests.fake_cuda train.py --prefix_len 16    # a whole program there

A tensor "on cuda" is a wrapper whose metadata say cuda:0 and that holds a CPU tensor. A TorchDispatchMode takes every
ATen call below autograd and autocast, refuses what CUDA would refuse (mixed devices, CPU generators, CPU-only kernels),
runs the rest on the held tensors, and wraps what comes out. So autograd, autocast (bfloat16 for "cuda"), checkpointing,
fused AdamW and autograd.Function run as they would. Half-precision products are formed in float32 and rounded once, as
a tensor core does. A CUDA graph is recorded and replayed: the same kernels on the same memory, and nothing else. What
this cannot see: kernels themselves, streams and races, torch.compile, and speed.

waits:    places at which the host waits for the device, {(kind, file:line function): times}
launches: {ATen op, with the dtype of a product's operands: times}: about one kernel each; no views or allocations
sdpa:     {(kernels that could take it, shapes, strides): times}: cuDNN, the first on H100, plans anew for each
live, peak: bytes of "device" memory alive, exact at every op, without the allocator's rounding and fragmentation
limit:    bytes at which memory runs out, if not 0
shapes=True: float tensors hold no numbers (meta), for real models' sizes; integers that come of them are ones.
"""

import collections
import contextlib
import math
import runpy
import sys
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
WAITS = {aten._local_scalar_dense: "item", aten.nonzero: "nonzero", aten.masked_select: "masked_select",
         aten.equal: "equal", aten._unique2: "unique", aten.bincount: "bincount"}
COPIES = {aten.copy_, aten._to_copy}
INDEX = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
MIXES = INDEX | COPIES | {aten.set_}
SCALARS = {aten.fill_, aten.masked_fill_, aten.masked_fill, aten.where}  # like pointwise ops, take a CPU scalar
FREE = {aten.detach, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
        aten._local_scalar_dense, aten.lift_fresh, aten.alias, aten._unsafe_view, aten._reshape_alias}


def flat(*args):
    return [y for x in args for y in (x if isinstance(x, (list, tuple)) else (x,))]


def each(function, x):
    return type(x)(map(function, x)) if type(x) in (list, tuple) else function(x)


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
        if inner.is_meta:
            self = Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                                 dtype=inner.dtype, device=CPU)
        else:
            self = Tensor._make_subclass(cls, inner)
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

    def cpu(self):
        return self.to(CPU)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **_):
        return f"cuda({self.inner!r})"

    def __deepcopy__(self, memo):
        with torch.no_grad():
            copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(copy, self.requires_grad)
        return copy.requires_grad_(self.requires_grad)


class Gpu(TorchDispatchMode):
    current = None

    def __init__(self, shapes=False, limit=0):
        super().__init__()
        self.shapes, self.limit, self.held, self.live, self.leaving, self.tape = shapes, limit, {}, 0, False, None
        self.reset()

    def reset(self):
        self.waits, self.launches, self.sdpa = (collections.Counter() for _ in range(3))
        self.peak = self.live

    def wait(self, kind):
        """Note that the host waits, and where: the nearest frame outside torch and this file."""
        if self.tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing (fake CUDA, {kind})")
        frame = sys._getframe(2)
        while frame.f_back and ("/torch/" in (name := frame.f_code.co_filename) or name == __file__
                                or "contextlib" in name):
            frame = frame.f_back
        self.waits[kind, f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, kwargs or {})

    def refuse(self, func, why):
        raise RuntimeError(f"{why} (fake CUDA, in {func})")

    def call(self, func, args, kwargs):
        op = func.overloadpacket
        given = flat(*args, *kwargs.values())
        on_cuda = [x for x in given if isinstance(x, CudaTensor)]
        on_cpu = [x for x in given if isinstance(x, Tensor) and x.device.type == "cpu"]
        target = next((x for x in given if isinstance(x, torch.device)), None)
        if on_cuda and not self.leaving or target is not None and target.type == "cuda":
            target = CUDA  # "cpu" may come from C++, which takes the wrappers for CPU tensors
        if not on_cuda and target != CUDA:
            return func(*args, **{k: v for k, v in kwargs.items() if k != "pin_memory"})  # no pinned memory here
        self.check(func, op, args, given, on_cuda, on_cpu, target)

        # --- run it on what the wrappers hold
        inner = {id(x.inner): x for x in on_cuda}
        number_less = self.shapes and any(x.inner.is_meta for x in on_cuda)
        made_on = CPU
        if self.shapes and not on_cuda + on_cpu and func(*args, **kwargs | {"device": "meta"}).is_floating_point():
            made_on = torch.device("meta")

        def held(x):
            if isinstance(x, torch.device) and x.type == "cuda":
                return made_on
            x = x.inner if isinstance(x, CudaTensor) else x
            if not number_less or not isinstance(x, Tensor) or op in COPIES or op in INDEX and x.dtype == torch.bool:
                return x
            return x.to("meta")

        a, k = [each(held, x) for x in args], {name: each(held, x) for name, x in kwargs.items()}
        if number_less and op in INDEX and any(i is not None and i.dtype == torch.bool for i in a[1]):
            a[1] = [y.to("meta") for i in a[1] for y in (i.nonzero().unbind(1) if i.dtype == torch.bool else (i,))]
        if number_less and op is aten._local_scalar_dense:
            return {torch.bool: True}.get(a[0].dtype, 1)
        if number_less and op is aten.copy_:
            out = a[0]  # a number-less tensor takes or gives nothing
        else:
            if number_less and op is aten._to_copy:
                k.pop("device", None)
            out = self.run(func, op, a, k, number_less)
        if op not in FREE and not any(r.alias_info is not None and not r.alias_info.is_write
                                      for r in func._schema.returns):
            dtype = f" {a[1].dtype}" if op in PRODUCTS else ""
            self.launches[str(op).removeprefix("aten.") + dtype] += 1
        if self.tape is not None:
            self.tape.append((lambda a=tuple(a), k=k: self.run(func, op, list(a), dict(k), number_less), out))
        if op is aten._local_scalar_dense or not isinstance(out, (Tensor, tuple, list)):
            return out
        if target != CUDA:
            return torch.ones(out.shape, dtype=out.dtype) if out.is_meta else out
        if func._schema.name.endswith("_") or "out" in kwargs:  # in place: what was given comes back
            out = kwargs.get("out", args[0])
            if isinstance(out, CudaTensor) and out.shape != out.inner.shape:
                raise RuntimeError(f"{func}: the simulated device cannot change a shape in place")
            return out
        return each(lambda x: inner.get(id(x)) or self.wrap(x) if isinstance(x, Tensor) else x, out)

    def check(self, func, op, args, given, on_cuda, on_cpu, target):
        """Refuse what CUDA refuses, and note where the host waits."""
        if on_cuda and on_cpu and op not in MIXES:
            scalars = torch.Tag.pointwise in func.tags or op in SCALARS
            if not scalars or any(x.dim() for x in on_cpu):
                where = [(str(x.device), tuple(x.shape)) for x in given if isinstance(x, Tensor)]
                self.refuse(func, f"Expected all tensors to be on the same device, found cuda:0 and cpu, {where}")
        if any(word in str(func) for word in ("mkldnn", "quantized", "_pin_memory")):
            self.refuse(func, "Could not run with arguments from the 'CUDA' backend")
        if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in given):
            self.refuse(func, "Expected a 'cuda' device type for generator but found 'cpu'")
        if func in (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out):
            a, b, wide = args[-3:] if op is aten.mm else (*args[1:3], args[3])
            if a.dtype != b.dtype or wide != a.dtype and not (wide == torch.float32 and a.dtype.itemsize == 2):
                self.refuse(func, f"out_dtype {wide} of a product of {a.dtype} and {b.dtype}")
        if op in WAITS:
            self.wait(WAITS[op])
        if op in COPIES:
            source, goal = (args[1], args[0].device) if op is aten.copy_ else (args[0], target)
            if source.device.type != goal.type:
                self.wait("to host" if goal.type == "cpu" else "to device")
        if op in INDEX:
            if not isinstance(args[0], CudaTensor):
                self.refuse(func, "indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            for i in args[1]:
                if i is not None and i.dtype in (torch.bool, torch.uint8):
                    self.wait("mask as index")
                elif i is not None and i.device.type == "cpu":
                    self.wait("index to device")
            if op is not aten.index and args[2].device.type == "cpu":
                self.wait("value to device")

    def run(self, func, op, args, kwargs, number_less):
        if func in (aten.mm.dtype, aten.mm.dtype_out):
            return torch.mm(args[0].float(), args[1].float(), out=kwargs.get("out"))
        if func in (aten.addmm.dtype, aten.addmm.dtype_out):
            return torch.addmm(args[0], args[1].float(), args[2].float(), **kwargs)
        if op in PRODUCTS and not number_less and args[0].dtype.itemsize == 2 and "out" not in kwargs:
            return func(*(x.float() if isinstance(x, Tensor) else x for x in args), **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    def wrap(self, x):
        if self.shapes and x.is_floating_point() != x.is_meta:
            x = x.to("meta") if x.is_floating_point() else torch.ones(x.shape, dtype=x.dtype)
        return CudaTensor(x, self)

    def kernel(self, name, function, *args):
        """A kernel that the CPU has no ATen call for: one launch, and memory for its results alone."""
        raw = [x.inner if isinstance(x, CudaTensor) else x for x in args]
        out = function(*raw)
        self.launches[name] += 1
        if self.tape is not None:
            self.tape.append((lambda: function(*raw), out))
        return tuple(map(self.wrap, out))


def to_indexed(plain):
    """Tensor.to, which would ask CUDA for its current device where none is named."""
    named = {"cuda": CUDA, torch.device("cuda"): CUDA}

    def to(self, *args, **kwargs):
        args = [named.get(x, x) if isinstance(x, (str, torch.device)) else x for x in args]
        return plain(self, *args, **{k: named.get(v, v) if k == "device" else v for k, v in kwargs.items()})

    return to


class Attention(torch.autograd.Function):
    """One kernel forward and one backward, which keep q, k, v, the output and a logsumexp."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal):
        def attend(q, k, v, mask):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
            y, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
            return y.transpose(1, 2).contiguous().transpose(1, 2), lse  # laid out by (B, T, heads, D) on a GPU

        out, lse = Gpu.current.kernel("attention", attend, q, k, v, mask)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        def differentiate(grad, q, k, v, out, lse):
            wide = [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)]
            dq, *d = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, *wide, out, lse, 0.0, True)
            return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in d)

        return *Gpu.current.kernel("attention_backward", differentiate, grad, *ctx.saved_tensors), None, None


def attention(plain):
    """F.scaled_dot_product_attention, and a note of which kernel CUDA would take."""

    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
        if not isinstance(q, CudaTensor):
            return plain(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) if x.dtype == torch.float32 else x for x in (q, k, v))
        half, backends = q.dtype.itemsize == 2, torch.backends.cuda
        usable = {
            "cudnn": half and q.shape[-1] % 8 == 0 and backends.cudnn_sdp_enabled(),
            "flash": half and attn_mask is None,
            "efficient": q.shape[1] == k.shape[1] and all(x.stride(-1) == 1 for x in (q, k, v)),
        }
        Gpu.current.sdpa["/".join(n for n in usable if usable[n]) or "math", q.shape, k.shape, k.stride()] += 1
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # as convert_boolean_attn_mask does
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
        return Attention.apply(q, k, v, attn_mask, is_causal)

    return sdpa


class Norm(torch.autograd.Function):
    """torch's fused RMSNorm: keeps its input and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        def normalize(x, weight):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
            return (wide * rstd * (1 if weight is None else weight)).to(x.dtype), rstd

        y, rstd = Gpu.current.kernel("rms_norm", normalize, x, weight)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        def differentiate(grad, x, weight, rstd):
            straight, scaled = x * rstd, grad * weight
            dx = rstd * (scaled - straight * (scaled * straight).mean(-1, keepdim=True))
            return dx.to(x.dtype), (grad * straight).flatten(0, -2).sum(0).to(weight.dtype)

        return *Gpu.current.kernel("rms_norm_backward", differentiate, grad, *ctx.saved_tensors), None


class Graph:
    """torch.cuda.CUDAGraph: replays the kernels that ran while it was captured, from and to the same memory."""

    tape = ()

    def pool(self):
        return 0

    def replay(self):
        Gpu.current.launches["graph"] += 1
        for function, recorded in self.tape:
            for x, new in zip(flat(recorded), flat(function())):
                if isinstance(x, Tensor) and x.data_ptr() != new.data_ptr():
                    x.copy_(new)

    @contextlib.contextmanager
    def capture(self, pool=None):
        self.tape = Gpu.current.tape = []
        yield
        Gpu.current.tape = None


@contextlib.contextmanager
def fake_cuda(**options):
    gpu, grouped = Gpu(**options), torch._C._group_tensors_by_device_and_dtype
    autocast, rms_norm = torch.autocast, F.rms_norm
    cuda = {
        "is_available": lambda: True, "_lazy_init": lambda: None, "is_initialized": lambda: True,
        "device_count": lambda: 1, "current_device": lambda: 0, "is_bf16_supported": lambda *a, **k: True,
        "get_device_capability": lambda *a: (9, 0), "get_device_name": lambda *a: "simulated",
        "synchronize": lambda *a: gpu.wait("synchronize"),
        "memory_allocated": lambda *a: gpu.live, "max_memory_allocated": lambda *a: gpu.peak,
        "reset_peak_memory_stats": lambda *a: setattr(gpu, "peak", gpu.live), "empty_cache": lambda: None,
        "CUDAGraph": Graph, "graph": Graph.capture, "device": lambda *a: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }
    patches = [mock.patch.object(torch.cuda, name, fake) for name, fake in cuda.items()]
    patches += [
        mock.patch.object(Gpu, "current", gpu),
        mock.patch.object(torch.accelerator, "current_accelerator", lambda *a, **k: None),  # asked for by optimizers
        mock.patch.object(F, "scaled_dot_product_attention", attention(F.scaled_dot_product_attention)),
        mock.patch.object(F, "rms_norm", lambda x, shape, weight=None, eps=None: (
            Norm.apply(x, weight, eps) if isinstance(x, CudaTensor) else rms_norm(x, shape, weight, eps))),
        mock.patch("torch.utils._foreach_utils._foreach_supported_types", [Tensor, CudaTensor]),
        mock.patch.object(torch, "autocast", lambda device_type, *args, **kwargs: autocast(
            "cpu" if device_type == "cuda" else device_type, *args, **kwargs)),
        mock.patch.object(Tensor, "to", to_indexed(Tensor.to)),
        mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", lambda lists, indices=False: {
            (CUDA if isinstance(lists[0][0], CudaTensor) else device, dtype): found
            for (device, dtype), found in grouped(lists, indices).items()}),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes it on the host, and moves it
        stack.enter_context(gpu)
        yield gpu


if __name__ == "__main__":
    from tests import fake_cuda as once  # not __main__'s: the program may import this, too  # noqa: PLW0406

    sys.argv = sys.argv[1:]
    with once.fake_cuda():
        runpy.run_path(sys.argv[0], run_name="__main__")
