"""The wire between a device and a cloud: frames, codecs, transports, network emulation. No torch."""
