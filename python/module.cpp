// The Python module fmd_ext._core: the planner and the facts of this build. No torch in here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "build_facts.h"
#include "fmd/plan.h"

namespace py = pybind11;

namespace {

// A numpy array over the vector's own memory; `owner`, the Python object that holds the vector, stays alive with it.
template <class T>
py::array view(const std::vector<T>& values, py::handle owner) {
  return py::array_t<T>({values.size()}, {sizeof(T)}, values.data(), owner);
}

std::string describe(const py::array& given) {
  std::string text = py::str(given.dtype()).cast<std::string>() + " [";
  for (py::ssize_t i = 0; i < given.ndim(); ++i) text += (i ? ", " : "") + std::to_string(given.shape(i));
  return text + "]";
}

// The argument as a contiguous array of exactly this dtype and shape; -1 in the shape accepts any size.
template <class T>
py::array_t<T, py::array::c_style> checked(const py::array& given, const char* name, const char* accepted,
                                           const std::vector<py::ssize_t>& shape) {
  bool fits = py::isinstance<py::array_t<T>>(given) && given.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || given.shape(i) == shape[i];
  if (!fits) throw py::value_error(std::string(name) + " is " + describe(given) + ", accepted is " + accepted);
  return py::array_t<T, py::array::c_style>::ensure(given);
}

fmd::Masking masking_from(const std::string& name) {
  if (name == "zero") return fmd::Masking::kZero;
  if (name == "attention") return fmd::Masking::kAttention;
  throw py::value_error("masking is '" + name + "', accepted is 'zero' or 'attention'");
}

fmd::Plan make_plan(const py::array& labels, const py::array& seg_len, const py::array& trunk_len,
                    const py::array& phase, const std::string& masking) {
  const auto labels_checked = checked<int8_t>(labels, "labels", "int8 [batch, length]", {-1, -1});
  const py::ssize_t batch = labels.shape(0), length = labels.shape(1);
  const std::string n = std::to_string(batch);
  const auto seg_len_checked =
      checked<int64_t>(seg_len, "seg_len", ("int64 [" + n + ", 3]").c_str(), {batch, fmd::kNumSegments});
  const auto trunk_len_checked = checked<int64_t>(trunk_len, "trunk_len", ("int64 [" + n + "]").c_str(), {batch});
  const auto phase_checked = checked<int8_t>(phase, "phase", ("int8 [" + n + "]").c_str(), {batch});
  return fmd::make_plan(labels_checked.data(), batch, length, seg_len_checked.data(), trunk_len_checked.data(),
                        phase_checked.data(), masking_from(masking));
}

py::list split(const std::string& text) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FMD_FACT_VERSION;
  info["build_type"] = FMD_FACT_BUILD_TYPE;
  info["compiler"] = FMD_FACT_COMPILER;
  info["cxx_flags"] = FMD_FACT_CXX_FLAGS;
  info["python"] = FMD_FACT_PYTHON;
  info["processor"] = FMD_FACT_PROCESSOR;
  info["torch_version"] = FMD_FACT_TORCH_VERSION;
  info["torch_target_version"] = FMD_FACT_TORCH_TARGET_VERSION;
  info["isa_variants"] = split(FMD_FACT_ISA_VARIANTS);
  info["cuda"] = static_cast<bool>(FMD_FACT_CUDA);
  info["cuda_reason"] = FMD_FACT_CUDA_REASON;
  info["cuda_compiler"] = FMD_FACT_CUDA_COMPILER;
  info["cuda_architectures"] = split(FMD_FACT_CUDA_ARCHITECTURES);
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The host-side planner of fork-merge decoding, and the facts of this build.";

  py::class_<fmd::RowGroups>(m, "RowGroups", "The rows and query groups of one attention call; int64 arrays.")
      .def_property_readonly(
          "qo_rows", [](py::object self) { return view(self.cast<const fmd::RowGroups&>().qo_rows, self); },
          "[rows]: the rows, group by group, in causal order")
      .def_property_readonly(
          "cu_seqlens_q", [](py::object self) { return view(self.cast<const fmd::RowGroups&>().cu_seqlens_q, self); },
          "[groups + 1]: where each group begins in qo_rows")
      .def_property_readonly(
          "group_segment", [](py::object self) { return view(self.cast<const fmd::RowGroups&>().group_segment, self); },
          "[groups]: sample * 3 + segment in the fork layers, the sample in the layers after the merge")
      .def_property_readonly(
          "row_segment", [](py::object self) { return view(self.cast<const fmd::RowGroups&>().row_segment, self); },
          "[rows]: the segment that the row's key is appended to")
      .def_property_readonly(
          "row_offset", [](py::object self) { return view(self.cast<const fmd::RowGroups&>().row_offset, self); },
          "[rows]: its place in that segment")
      .def_readonly("max_qo_len", &fmd::RowGroups::max_qo_len, "rows of the largest group");

  py::class_<fmd::Plan>(m, "Plan", "What one forward call computes. Arrays are views that keep the plan alive.")
      .def_readonly("num_home", &fmd::Plan::num_home, "home rows are rows 0 .. num_home - 1, away rows follow")
      .def_property_readonly(
          "num_rows", [](const fmd::Plan& plan) { return plan.positions.size(); }, "home and away rows")
      .def_property_readonly(
          "positions", [](py::object self) { return view(self.cast<const fmd::Plan&>().positions, self); },
          "int64 [rows]: index into the labels, sample * length + position")
      .def_property_readonly(
          "home_rows", [](py::object self) { return view(self.cast<const fmd::Plan&>().home_rows, self); },
          "int64 [away rows]: the home row that away row num_home + j merges into")
      .def_property_readonly(
          "away_modality", [](py::object self) { return view(self.cast<const fmd::Plan&>().away_modality, self); },
          "int64 [away rows]: 0 text, 1 visual, 2 audio, 3 joint")
      .def_readonly("fork", &fmd::Plan::fork, "RowGroups of the layers before the merge")
      .def_readonly("trunk", &fmd::Plan::trunk, "RowGroups of the layers after it")
      .def_property_readonly(
          "seg_len",
          [](py::object self) {
            return view(self.cast<const fmd::Plan&>().seg_len, self)
                .reshape({py::ssize_t{-1}, py::ssize_t{fmd::kNumSegments}});
          },
          "int64 [batch, 3]: keys per segment after this call")
      .def_property_readonly(
          "phase", [](py::object self) { return view(self.cast<const fmd::Plan&>().phase, self); },
          "int8 [batch]: phases after this call");

  m.def("make_plan", &make_plan, py::arg("labels"), py::arg("seg_len"), py::arg("trunk_len"), py::arg("phase"),
        py::arg("masking"),
        R"(Plans one forward call of a padded batch.

labels: int8 [batch, length]: -1 padding (anywhere), 0 text, 1 visual, 2 audio, 3 joint
    (visual and audio mixed in one embedding; in both branches, with masking "zero" only).
seg_len: int64 [batch, 3]: keys cached per segment (prefix, visual branch, audio branch) in the layers before the merge.
trunk_len: int64 [batch]: keys cached in the layers after it.
phase: int8 [batch]: 0 unforked, 1 prefix open (forks at the first visual or audio position), 2 forked.
masking: "zero" or "attention".
Returns a Plan. Raises ValueError for another dtype, shape, label, phase or masking, or a negative length.)");

  m.def("build_info", &build_info, "How this module and the op libraries beside it were built: a dict.");
}
