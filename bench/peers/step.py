"""The whole training step in PyTorch, beside `hardmine bench step`: ResNet18, 112x112, HM-ArcFace,
batch-norm on the embedding, SGD; channels_last, autocast for 16 bits; images already in memory as
uint8, flipped and normalised in the step, as hardmine does.

    python3 bench/peers/step.py --precision bf16 --threads 2
"""
import argparse

import torch

from common import autocast_for, compiled, hard_mining_arcface, milliseconds, report, sgd
from resnet18 import ResNet18

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--classes", type=int, default=10575)
parser.add_argument("--device", default="cpu")
parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--repeats", type=int, default=15)
parser.add_argument("--contiguous", action="store_true", help="plain NCHW instead of channels_last")
parser.add_argument("--compile", action="store_true", help="torch.compile network and loss (PyTorch 2)")
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
torch.backends.cudnn.benchmark = True
layout = torch.contiguous_format if arguments.contiguous else torch.channels_last
device = arguments.device
autocast = autocast_for(device, arguments.precision)

torch.manual_seed(0)
network = ResNet18().to(device).to(memory_format=layout)
embedding_bn = torch.nn.BatchNorm1d(512).to(device)
embedding_bn.weight.requires_grad_(False)  # stays 1
weights = torch.nn.Parameter(torch.randn(arguments.classes, 512, device=device) * 0.01)
parameters = [*network.parameters(), embedding_bn.bias, weights]
optimiser = sgd(parameters, device)
scaler = torch.cuda.amp.GradScaler(enabled=arguments.precision == "fp16")
images = torch.randint(0, 256, (arguments.batch, 3, 112, 112), dtype=torch.uint8, device=device)
labels = torch.randint(arguments.classes, (arguments.batch,), device=device)


def loss_of(x):
    embeddings = embedding_bn(network(x).float())
    return hard_mining_arcface(embeddings, weights, labels)


if arguments.compile:
    loss_of = compiled(loss_of, device)


def step():
    optimiser.zero_grad(set_to_none=True)
    flip = torch.rand(arguments.batch, 1, 1, 1, device=device) < 0.5
    x = torch.where(flip, images.flip(3), images).to(memory_format=layout)
    x = (x.float() - 127.5) / 128
    with autocast():
        loss = loss_of(x)
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()


times = milliseconds(step, arguments.repeats, device)
report([{
    "peer": "pytorch compiled" if arguments.compile else "pytorch eager",
    "precision": arguments.precision, "batch": arguments.batch, "classes": arguments.classes,
    "threads": arguments.threads, "layout": "nchw" if arguments.contiguous else "nhwc", "stepMs": times,
    "imagesPerSecond": {key: arguments.batch * 1e3 / times[other]
                        for key, other in (("median", "median"), ("min", "max"), ("max", "min"))},
}], device)
