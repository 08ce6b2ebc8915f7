"""World models pre-trained on plain videos with semantic actions, for control in imagination."""
