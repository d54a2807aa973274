// What the Python and Triton sides read of the ABI, so that nothing of it is written twice.
#pragma once

#include <pybind11/pybind11.h>

namespace pybatch {

// Adds the attributes
//   rules         {name: (number, states, "none" | "gradient" | "direction", {hyper-parameter: column}, scalar,
//   squares)};
//                 scalar: what the rule keeps of each tensor is at first, or None
//   hyper         {name: column} of the hyper-parameters that all rules share, and hyper_columns
//   columns, ledger, layer, row_norms   {name: index}, and column_count, ledger_size, layer_size, row_norm_count;
//                 "state" is the first of the states' columns, "scale" of their scales'
//   state_types   {"fp32" | "bf16" | "8bit": number}, state_block, and state_codes: what 256 codes stand for, in shares
//   of
//                 the scale, without and with a sign
//   storages      {name: number}, and storage_count; without fp16 where the compiler has none
//   dtypes        {name: number} of gradients
//   ring_rows, layer_blocks
void export_constants(pybind11::module_& m);

}  // namespace pybatch
