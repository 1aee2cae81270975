"""Transport: the Open Inference Protocol over HTTP and gRPC; what is common to both knows neither."""
