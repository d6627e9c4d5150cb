"""Where a run's metrics, samples and report page are shown: TensorBoard, and the trackers of `--track`."""
