"""Fixtures shared by the tests of folders: saved and original ones, copies to damage, a guard against pickles."""

import pickle
import shutil
import socket

import pytest
import saved_models
import tiny_folder
import torch

import klfast


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a tied Mamba, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    klfast.save_quantized(saved_models.quantized("mamba", tied=True), folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """Copy ``saved`` to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Save a tiny model in full precision."""
    return tiny_folder.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original, tmp_path):
    """Copy ``original`` to damage."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def no_pickle_and_no_network(monkeypatch):
    """Make unpickling and network access fail."""

    def refuse(*_, **__):
        raise AssertionError("klfast must not unpickle anything or, in these tests, use the network")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
