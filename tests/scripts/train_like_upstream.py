"""A training script in the style of the original DDPM code's; only the imports know of ddpm_fast.

It trains on small random pictures that stand in for CIFAR-10, evaluates on a test loader, samples, and saves both
state dicts, from which it can resume.
"""

import argparse
import os

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ddpm_fast import script_utils


class Pictures(Dataset):
    def __init__(self, count, transform):
        generator = np.random.default_rng(0)
        self.images = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        self.labels = generator.integers(0, 10, count).tolist()
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def create_argparser():
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    defaults = {
        "learning_rate": 2e-4,
        "batch_size": 4,
        "iterations": 6,
        "log_rate": 3,
        "checkpoint_rate": 3,
        "log_dir": ".",
        "model_checkpoint": None,
        "optim_checkpoint": None,
        "schedule_low": 1e-4,
        "schedule_high": 0.02,
        "device": device,
    }
    defaults.update(script_utils.diffusion_defaults())
    parser = argparse.ArgumentParser()
    script_utils.add_dict_to_argparser(parser, defaults)
    return parser


def main():
    args = create_argparser().parse_args()
    device = args.device
    diffusion = script_utils.get_diffusion_from_args(args).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=args.learning_rate)
    if args.model_checkpoint is not None:
        diffusion.load_state_dict(torch.load(args.model_checkpoint))
    if args.optim_checkpoint is not None:
        optimizer.load_state_dict(torch.load(args.optim_checkpoint))

    transform = script_utils.get_transform()
    train_loader = script_utils.cycle(
        DataLoader(Pictures(20, transform), args.batch_size, shuffle=True, drop_last=True)
    )
    test_loader = DataLoader(Pictures(8, transform), batch_size=args.batch_size)

    train_loss = 0.0
    for iteration in range(1, args.iterations + 1):
        diffusion.train()
        x, y = next(train_loader)
        x, y = x.to(device), y.to(device)
        loss = diffusion(x, y) if args.use_labels else diffusion(x)
        train_loss += loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        diffusion.update_ema()

        if iteration % args.log_rate == 0:
            test_loss = 0.0
            with torch.no_grad():
                diffusion.eval()
                for x, y in test_loader:
                    x, y = x.to(device), y.to(device)
                    test_loss += (diffusion(x, y) if args.use_labels else diffusion(x)).item()
            if args.use_labels:
                samples = diffusion.sample(10, device, y=torch.arange(10, device=device))
            else:
                samples = diffusion.sample(10, device)
            samples = ((samples + 1) / 2).clip(0, 1).permute(0, 2, 3, 1).numpy()
            print(iteration, train_loss / args.log_rate, test_loss / len(test_loader), samples.shape, samples.mean())
            train_loss = 0.0

        if iteration % args.checkpoint_rate == 0:
            torch.save(diffusion.state_dict(), os.path.join(args.log_dir, f"run-iteration-{iteration}-model.pth"))
            torch.save(optimizer.state_dict(), os.path.join(args.log_dir, f"run-iteration-{iteration}-optim.pth"))


if __name__ == "__main__":
    main()
