"""Other people's trainers and trackers: transformers, Lightning, accelerate; TensorBoard, W&B, CSV. One module each."""
