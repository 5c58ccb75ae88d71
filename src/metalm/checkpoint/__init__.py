"""Checkpoints on disk: logical parameters in safetensors pieces, JSON beside them, a manifest over all.

Knows torch and safetensors, not the engines: conversion and inspection read a checkpoint on a machine
without DeepSpeed and Megatron. Nothing here unpickles.
"""
