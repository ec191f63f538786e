"""Mixed traffic on one fused model, on its experts side by side, and on LoRA adapters of one anchor."""
