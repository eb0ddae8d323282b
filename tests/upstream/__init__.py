"""What the package relies on in verl, torch, transformers, Ray and Hydra."""
