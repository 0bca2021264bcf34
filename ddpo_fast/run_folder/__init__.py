"""The files of a run in its output folder.

run_log              all records of a run: its folder, settings, metrics, trackers and the reward curve
checkpoint           checkpoints/: weights, optimizer and random states, from which a run is resumed
metrics_file         metrics.jsonl: a line for each update and each epoch
pictures             rewards.png, and grids of images
sample_files         samples/: images of fixed prompts and noise in the course of the run
notebook             pictures and bars in a notebook
trackers             TensorBoard, Weights & Biases, ... through accelerate
folder_lock          .lock: one process writes to a folder
progress             counters of epochs and updates, and what is kept when a run stops
resume_checks        whether a run can go on from a checkpoint
hub                  the trained model with its card, on disk or on the Hub
model_card           what a model's card says
files                digests, modes and syncing to the disk
plain_data           the state of a user's functions as data that is loaded without running code
recorded_settings    the types of what state.json and config.json say
"""
