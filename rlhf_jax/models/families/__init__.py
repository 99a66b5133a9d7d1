"""Every supported `model_type`. A family is data: a spec made from `config.json`, and a map of its tensors."""
