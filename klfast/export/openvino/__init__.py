"""Models as OpenVINO's IR, with klfast's own codes and scales."""
