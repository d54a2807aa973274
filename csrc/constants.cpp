#include "constants.h"

#include <pybind11/stl.h>

#include <initializer_list>
#include <iterator>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "narrow.h"
#include "number.h"
#include "rules.h"
#include "table.h"

namespace py = pybind11;

namespace pybatch {
namespace {

py::dict named(std::initializer_list<std::pair<const char*, int>> constants) {
    py::dict result;
    for (const auto& [name, value] : constants) result[name] = value;
    return result;
}

const char* name_of(PB_ISA::Norms norms) {
    switch (norms) {
        case PB_ISA::Norms::gradient:
            return "gradient";
        case PB_ISA::Norms::direction:
            return "direction";
        default:
            return "none";
    }
}

// The columns of a struct of PB_HYPER, from its text.
template <class Hyper>
py::dict columns_of() {
    py::dict result;
    std::istringstream names{Hyper::names};
    std::string name;
    for (int column = PB_ISA::kHyperOwn; std::getline(names >> std::ws, name, ','); ++column)
        result[name.c_str()] = column;
    return result;
}

template <class Rule>
py::object scalar_of() {
    if constexpr (PB_ISA::KeepsScalar<Rule>::value)
        return py::float_(Rule::scalar);
    else
        return py::none();
}

}  // namespace

void export_constants(py::module_& m) {
    py::dict rules;
#define PB_NUMBER(NUMBER, RULE)                                                                                       \
    rules[#RULE] =                                                                                                    \
        py::make_tuple(NUMBER, PB_ISA::RULE::states, name_of(PB_ISA::RULE::norms), columns_of<PB_ISA::RULE::Hyper>(), \
                       scalar_of<PB_ISA::RULE>(), PB_ISA::SquaredStates<PB_ISA::RULE>::value);
    PB_FOR_EACH_RULE(PB_NUMBER)
#undef PB_NUMBER
    m.attr("rules") = rules;
    m.attr("hyper") = named({{"lr", PB_ISA::kLearningRate}, {"maximize", PB_ISA::kMaximize}});
    m.attr("columns") = named({{"param", kParam},
                               {"grad", kGrad},
                               {"sum", kSum},
                               {"master", kMaster},
                               {"numel", kNumel},
                               {"code", kCode},
                               {"grad_type", kGradType},
                               {"group", kGroup},
                               {"fresh", kFresh},
                               {"salt", kSalt},
                               {"state", kState},
                               {"scale", PB_ISA::kScale}});
    m.attr("state_types") = named({{"fp32", kStateFloat32}, {"bf16", kStateBFloat16}, {"8bit", kState8Bit}});
    m.attr("state_block") = int(kStateBlock);
    py::list codes;
    for (const auto& table : PB_ISA::kCodes.value) codes.append(std::vector<float>(std::begin(table), std::end(table)));
    m.attr("state_codes") = codes;
    m.attr("ledger") = named({{"sum_sq", kSumSq},
                              {"bad", kBad},
                              {"micro_sq", kMicroSq},
                              {"norm", kNorm},
                              {"clip", kClip},
                              {"skipped", kSkipped},
                              {"pairs", kPairs},
                              {"small_sum", kSmallSum},
                              {"large_sum", kLargeSum},
                              {"ring_steps", kRingSteps},
                              {"ring_length", kRingLength},
                              {"skip", kSkip}});
    m.attr("layer") = named({{"micro_sq", kLayerMicroSq}, {"sum_sq", kLayerSumSq}, {"ring", kLayerColumns}});
    m.attr("row_norms") = named({{"param_sq", kParamSq}, {"direction_sq", kDirectionSq}});
    m.attr("dtypes") = named({{"float32", kGradFloat32},
                              {"bfloat16", kGradBFloat16},
#ifdef PB_FLOAT16
                              {"float16", kGradFloat16}
#endif
    });
    m.attr("storages") = named({{"float32", kFloat32},
                                {"bfloat16", kBFloat16},
                                {"bfloat16_master", kBFloat16Master},
                                {"bfloat16_remainder", kBFloat16Remainder},
                                {"bfloat16_stochastic", kBFloat16Stochastic},
#ifdef PB_FLOAT16
                                {"float16", kFloat16},
                                {"float16_master", kFloat16Master},
                                {"float16_stochastic", kFloat16Stochastic}
#endif
    });
    m.attr("column_count") = PB_ISA::kColumns;
    m.attr("ledger_size") = int(kLedgerSize);
    m.attr("ring_rows") = kRingRows;
    m.attr("layer_blocks") = kLayerBlocks;
    m.attr("layer_size") = kLayerSize;
    m.attr("row_norm_count") = int(kRowNorms);
    m.attr("storage_count") = int(kStorages);
    m.attr("hyper_columns") = PB_ISA::kHyperColumns;
}

}  // namespace pybatch
