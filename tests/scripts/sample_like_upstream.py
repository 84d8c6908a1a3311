"""A sampling script in the style of the original DDPM code's. It defines no schedule_low and schedule_high."""

import argparse

import torch
from PIL import Image

from ddpm_fast import script_utils


def create_argparser():
    defaults = {"num_images": 20, "device": torch.device("cpu"), "model_path": None, "save_dir": "."}
    defaults.update(script_utils.diffusion_defaults())
    parser = argparse.ArgumentParser()
    script_utils.add_dict_to_argparser(parser, defaults)
    return parser


def main():
    args = create_argparser().parse_args()
    diffusion = script_utils.get_diffusion_from_args(args).to(args.device)
    diffusion.load_state_dict(torch.load(args.model_path))
    if args.use_labels:
        for label in range(10):
            y = torch.ones(args.num_images // 10, dtype=torch.long, device=args.device) * label
            save(diffusion.sample(args.num_images // 10, args.device, y=y), args.save_dir, f"{label}-")
    else:
        save(diffusion.sample(args.num_images, args.device), args.save_dir, "")


def save(samples, save_dir, prefix):
    for index, image in enumerate(((samples + 1) / 2).clip(0, 1)):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(f"{save_dir}/{prefix}{index}.png")


if __name__ == "__main__":
    main()
