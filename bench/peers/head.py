"""The margin head in PyTorch: forward and backward of HM-ArcFace, beside `hardmine bench head`.

    python3 bench/peers/head.py --threads 2 --shapes 64x512x10575,512x512x85742
"""
import argparse

import torch

from common import autocast_for, compiled, hard_mining_arcface, milliseconds, report, sgd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--shapes", default="64x512x10575,512x512x85742")
parser.add_argument("--device", default="cpu")
parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--repeats", type=int, default=7)
parser.add_argument("--compile", action="store_true", help="torch.compile the loss (PyTorch 2)")
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
autocast = autocast_for(arguments.device, arguments.precision)
loss_of = hard_mining_arcface
if arguments.compile:
    loss_of = compiled(hard_mining_arcface, arguments.device)

results = []
for shape in arguments.shapes.split(","):
    batch, dim, classes = (int(size) for size in shape.split("x"))
    torch.manual_seed(0)
    embeddings = torch.randn(batch, dim, device=arguments.device, requires_grad=True)
    weights = (torch.randn(classes, dim, device=arguments.device) * 0.01).requires_grad_()
    labels = torch.randint(classes, (batch,), device=arguments.device)
    optimiser = sgd([weights], arguments.device)

    def forward_backward():
        embeddings.grad = None
        weights.grad = None
        with autocast():
            loss = loss_of(embeddings, weights, labels)
        loss.backward()

    def step():
        forward_backward()
        optimiser.step()

    results.append({
        "peer": "pytorch compiled" if arguments.compile else "pytorch eager",
        "precision": arguments.precision, "batch": batch, "dim": dim, "classes": classes,
        "threads": arguments.threads,
        "forwardBackwardMs": milliseconds(forward_backward, arguments.repeats, arguments.device),
        "stepMs": milliseconds(step, arguments.repeats, arguments.device),
    })
report(results, arguments.device)
