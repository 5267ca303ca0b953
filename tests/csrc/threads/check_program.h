// A program of the engine that has every kind of layer.
#pragma once

namespace klfast::test {

// Whether its results, of prompts and of single tokens, have the same bits from teams of one, two and three threads, at
// every tier of this machine.
bool check_program();

}  // namespace klfast::test
