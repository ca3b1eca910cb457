"""Studies of models that the core trains: ablation and inspection."""
