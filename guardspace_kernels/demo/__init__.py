"""`guardspace demo`: plain LoRA fine-tuning destroys refusals of a small model, GuardSpace keeps them."""
