"""What the PyTorch peers share: the paper's loss in plain PyTorch and the timing of a callable."""
import contextlib
import json
import platform
import statistics
import sys
import time

import torch

# The paper's constants (Srivastava, Murali, Dubey 2020), Equation 2.
ALPHA, BETA, A, B = 1.5, 1.1, 35.0, 0.75


def hard_mining_arcface(embeddings, weights, labels, scale=64.0, margin=0.5):
    """Per-sample HM-ArcFace, exact gradient, as a PyTorch user would write it; returns the mean loss."""
    cosine = torch.nn.functional.linear(
        torch.nn.functional.normalize(embeddings), torch.nn.functional.normalize(weights)
    ).float()
    rows = torch.arange(labels.shape[0], device=labels.device)
    theta = torch.acos(cosine[rows, labels].clamp(-1 + 1e-7, 1 - 1e-7))
    logits = scale * cosine.index_put((rows, labels), torch.cos(theta + margin))
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (ALPHA * loss * torch.sigmoid(A * (BETA * loss - B))).mean()


def autocast_for(device, precision):
    """A factory of autocast contexts; fp32 gets none (PyTorch 1.13 refuses autocast to fp32). On a GPU
    fp32 products are TF32, as hardmine's and as cuDNN's are by default."""
    if precision == "fp32":
        if device.startswith("cuda"):
            torch.set_float32_matmul_precision("high")
        return contextlib.nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return lambda: torch.autocast(device.split(":")[0], dtype=dtype)


def sgd(parameters, device):
    """PyTorch's fastest SGD: on a GPU one kernel for many tensors, which reads GradScaler's verdict there."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4,
                           **({"fused": True} if device.startswith("cuda") else {}))


def compiled(function, device):
    """torch.compile for these shapes, with CUDA graphs where there is a GPU: PyTorch's fastest."""
    mode = "reduce-overhead" if device.startswith("cuda") else "default"
    return torch.compile(function, mode=mode, dynamic=False)


def cuda_graphs_skipped():
    """How often torch.compile did without CUDA graphs; None where it was not asked."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo and dynamo.counters["inductor"]["cudagraph_skips"]


def milliseconds(run, repeats, device="cpu", warm_up=3):
    """Times run() `repeats` times after a warm-up; {median, min, max} in ms. On a GPU each time is that of
    eight runs without waiting between them, as a training loop has them, divided by eight."""
    runs = 8 if device.startswith("cuda") else 1

    def wait():
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        for _ in range(runs):
            run()
        wait()
        times.append((time.perf_counter() - start) * 1e3 / runs)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def report(results, device):
    print(json.dumps({"device": device_name(device), "torch": torch.__version__,
                      "cudaGraphsSkipped": cuda_graphs_skipped(),
                      "threads": torch.get_num_threads(), "results": results}, indent=2))
