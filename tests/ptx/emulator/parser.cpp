// From PTX text to a Program: a lexer, declarations, and one instruction after another.

#include <cctype>
#include <stdexcept>

#include "program.h"

namespace ptx {
namespace {

struct Token {
    std::string text;
    int line;
};

bool in_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || (c && std::string("_.$%-<>").find(c) != std::string::npos);
}

std::vector<Token> tokens_of(const std::string& text) {
    std::vector<Token> tokens;
    int line = 1;
    for (size_t i = 0; i < text.size();) {
        const char c = text[i];
        if (c == '\n') ++line;
        if (std::isspace(static_cast<unsigned char>(c))) {
            ++i;
        } else if (text.compare(i, 2, "//") == 0) {
            while (i < text.size() && text[i] != '\n') ++i;
        } else if (c == '"') {
            const size_t end = text.find('"', i + 1);
            tokens.push_back({text.substr(i, end + 1 - i), line});
            i = end + 1;
        } else if (in_word(c)) {
            size_t end = i;
            while (end < text.size() && in_word(text[end])) ++end;
            tokens.push_back({text.substr(i, end - i), line});
            i = end;
        } else {
            tokens.push_back({std::string(1, c), line});
            ++i;
        }
    }
    return tokens;
}

int bytes_of(const std::string& type) {  // "f32", "b8", ...
    if (type == "pred") return 1;
    return std::stoi(type.substr(type.find_first_of("0123456789"))) / 8;
}

std::vector<std::string> split(const std::string& mnemonic) {
    std::vector<std::string> parts{""};
    for (char c : mnemonic)
        if (c == '.')
            parts.emplace_back();
        else
            parts.back() += c;
    return parts;
}

class Parser {
  public:
    explicit Parser(const std::string& text) : tokens_(tokens_of(text)), program_(std::make_unique<Program>()) {}

    std::unique_ptr<Program> parse() {
        while (at_ < tokens_.size()) {
            const std::string word = next();
            if (word == ".entry" || word == ".func")
                function(word == ".func");
            else if (word == ".shared")
                declare_shared();
            else if (word == ".global")
                declare_constants();
            else if (word == ".version" || word == ".target" || word == ".address_size" || word == ".file")
                skip_line();
            else if (word == ".section")
                skip_braces();
            else if (word != ".visible" && word != ".weak" && word != ".extern")
                fail("declaration " + word);
        }
        return std::move(program_);
    }

  private:
    [[noreturn]] void fail(const std::string& what) const {
        const int line = tokens_[at_ > 0 ? at_ - 1 : 0].line;
        throw std::invalid_argument("PTX line " + std::to_string(line) + ": the emulator does not know " + what);
    }
    const std::string& peek() const {
        if (at_ >= tokens_.size()) fail("an end in the middle");
        return tokens_[at_].text;
    }
    std::string next() {
        const std::string text = peek();
        ++at_;
        return text;
    }
    bool take(const std::string& text) {
        if (at_ >= tokens_.size() || peek() != text) return false;
        ++at_;
        return true;
    }
    void expect(const std::string& text) {
        if (!take(text)) fail("'" + peek() + "' where '" + text + "' should be");
    }
    void skip_line() {
        const int line = tokens_[at_ - 1].line;
        while (at_ < tokens_.size() && tokens_[at_].line == line) ++at_;
    }
    void skip_braces() {
        while (next() != "{") {
        }
        for (int depth = 1; depth > 0;) {
            const std::string text = next();
            depth += text == "{" ? 1 : text == "}" ? -1 : 0;
        }
    }

    // ".align N .type name[size]" after its space, up to the comma, bracket or semicolon behind it: (name, alignment,
    // bytes).
    struct Variable {
        std::string name;
        int align = 1, bytes = 0;
    };
    Variable variable() {
        Variable result;
        std::string type;
        for (std::string word = next();; word = next()) {
            if (word == ".align")
                result.align = std::stoi(next());
            else if (word == ".ptr" || word == ".global" || word == ".shared")
                continue;
            else if (word[0] == '.')
                type = word;
            else {
                result.name = word;
                break;
            }
        }
        result.bytes = bytes_of(type);
        result.align = std::max(result.align, result.bytes);
        if (take("[")) {
            result.bytes = take("]") ? 0 : result.bytes * std::stoi(next());
            if (result.bytes) expect("]");
        }
        return result;
    }

    void declare_shared() {
        const Variable v = variable();
        expect(";");
        if (symbols_.count(v.name)) return;
        program_->shared_bytes = (program_->shared_bytes + v.align - 1) / v.align * v.align;
        symbols_[v.name] = program_->shared_bytes;
        program_->shared_bytes += v.bytes;
    }

    void declare_constants() {  // an array of bytes with its values
        const Variable v = variable();
        auto& bytes = program_->constants;
        bytes.resize((bytes.size() + v.align - 1) / v.align * v.align);
        symbols_[v.name] = kConstants + bytes.size();
        const size_t end = bytes.size() + v.bytes;
        expect("=");
        expect("{");
        do bytes.push_back(uint8_t(std::stoi(next())));
        while (take(","));
        expect("}");
        expect(";");
        bytes.resize(end);
    }

    int place(const Variable& v) {
        function_->frame = (function_->frame + v.align - 1) / v.align * v.align;
        const int offset = function_->frame;
        params_[v.name] = offset;
        function_->frame += v.bytes;
        return offset;
    }

    std::vector<int> parameters() {
        std::vector<int> offsets;
        expect("(");
        while (!take(")")) {
            expect(".param");
            offsets.push_back(place(variable()));
            take(",");
        }
        return offsets;
    }

    void function(bool device) {
        Function made;
        function_ = &made;
        registers_ = {
            {"%tid.x", kThreadIndex}, {"%ctaid.x", kBlockIndex}, {"%nctaid.x", kBlockCount}, {"%ntid.x", kThreadCount}};
        params_.clear(), labels_.clear(), tables_.clear(), jumps_.clear();
        std::vector<int> result;
        if (device && peek() == "(") result = parameters();
        function_->name = next();
        function_->params = parameters();
        function_->param_bytes = function_->frame;
        function_->params.insert(function_->params.end(), result.begin(), result.end());
        while (peek() != "{" && peek() != ";") {
            const std::string directive = next();
            if (directive == ".maxntid" || directive == ".reqntid") function_->threads = uint32_t(std::stoi(next()));
        }
        auto& place = program_->functions[made.name];
        if (!place) place = std::make_unique<Function>();  // calls hold its address, which a prototype announces
        if (next() == ";") return;
        for (int depth = 1; depth > 0;) {
            if (take("{"))
                ++depth;
            else if (take("}"))
                --depth;
            else
                statement();
        }
        function_->body.emplace_back().kind = Kind::ret;  // a kernel may end without one
        for (const auto& [instruction, label] : jumps_) {
            for (const auto& name : tables_.count(label) ? tables_[label] : std::vector<std::string>{label}) {
                if (!labels_.count(name)) fail("the label " + name);
                function_->body[instruction].targets.push_back(labels_[name]);
            }
        }
        *place = std::move(made);
    }

    void statement() {
        std::string word = next();
        if (word == ";") return;
        if (word == ".reg") {
            next();
            for (word = next(); word != ";"; word = next())
                if (word != ",") register_of(word);
        } else if (word == ".pragma") {
            while (next() != ";") {
            }
        } else if (word == ".loc" || word == ".file") {
            skip_line();
        } else if (word == ".shared") {
            declare_shared();
        } else if (word == ".param") {
            place(variable());
            expect(";");
        } else if (take(":")) {
            if (take(".branchtargets")) do
                    tables_[word].push_back(next());
                while (take(","));
            else
                labels_[word] = int(function_->body.size());
        } else {
            instruction(word);
        }
    }

    int register_of(const std::string& name) {
        if (name == "_") return -1;
        const auto [place, is_new] = registers_.try_emplace(name, function_->registers);
        if (is_new) ++function_->registers;
        return place->second;
    }

    Operand operand(const std::string& word) {
        if (word == "_") return {};  // a result that is not wanted
        if (word[0] == '%' || registers_.count(word)) return {register_of(word), 0};
        if (word.rfind("0f", 0) == 0 || word.rfind("0F", 0) == 0 || word.rfind("0d", 0) == 0 ||
            word.rfind("0D", 0) == 0)
            return {-1, std::stoull(word.substr(2), nullptr, 16)};
        if (std::isdigit(word[0])) return {-1, std::stoull(word, nullptr, 0)};
        if (word[0] == '-') return {-1, uint64_t(std::stoll(word, nullptr, 0))};
        if (const auto found = symbols_.find(word); found != symbols_.end()) return {-1, found->second};
        if (const auto found = params_.find(word); found != params_.end()) return {-1, uint64_t(found->second)};
        fail("the operand " + word);
    }

    std::vector<Operand> operands() {  // one word, or a list in braces
        if (!take("{")) return {operand(next())};
        std::vector<Operand> list;
        do list.push_back(operand(next()));
        while (take(","));
        expect("}");
        return list;
    }

    void memory(Instruction& i) {
        expect("[");
        i.in.push_back(operand(next()));
        if (take("+")) i.offset = std::stoll(next(), nullptr, 0);
        expect("]");
    }

    void outputs(Instruction& i) {
        for (const Operand& o : operands()) i.out.push_back(o.reg);
        expect(",");
    }

    void rest(Instruction& i) {
        do
            for (const Operand& o : operands()) i.in.push_back(o);
        while (take(","));
    }

    void call(Instruction& i) {
        i.kind = Kind::call;
        std::vector<int> result;
        const auto list = [&](std::vector<int>& to) {
            expect("(");
            while (!take(")")) {
                to.push_back(int(operand(next()).value));
                take(",");
            }
        };
        if (peek() == "(") {
            list(result);
            expect(",");
        }
        const std::string name = next();
        const auto found = program_->functions.find(name);
        if (found == program_->functions.end()) fail("the function " + name);
        i.callee = found->second.get();
        if (take(",")) list(i.arguments);
        i.arguments.insert(i.arguments.end(), result.begin(), result.end());
    }

    void instruction(std::string word) {
        Instruction i;
        if (word == "@") {
            i.negated = take("!");
            i.guard = register_of(next());
            word = next();
        }
        i.line = tokens_[at_ - 1].line;
        i.text = word;
        const auto parts = split(word);
        const std::string& name = parts[0];
        const bool is_memory = name == "ld" || name == "st" || name == "atom" || name == "red";
        if (is_memory) {
            for (const auto& part : parts) {
                if (part == "global") i.space = Space::global;
                if (part == "shared") i.space = Space::shared;
                if (part == "param") i.space = Space::param;
                for (const char* more : {"volatile", "relaxed", "acquire", "release", "local", "L1", "bulk"})
                    if (part == more) fail(word);
            }
            i.bytes = bytes_of(parts.back());
            i.is_signed = parts.back()[0] == 's';
        }
        if (name == "ld") {
            i.kind = Kind::load;
            outputs(i);
            memory(i);
        } else if (name == "st") {
            i.kind = Kind::store;
            memory(i);
            expect(",");
            rest(i);
        } else if (name == "atom") {
            if (word != "atom.global.add.u32" && word != "atom.global.inc.u32") fail(word);
            i.kind = Kind::atomic;
            outputs(i);
            memory(i);
            expect(",");
            rest(i);
        } else if (word == "membar.gl" || word == "fence.acq_rel.gpu" || word == "fence.sc.gpu") {
            i.kind = Kind::fence;
        } else if (word == "bar.sync" || word == "barrier.sync") {
            i.kind = Kind::barrier;
            if (next() != "0") fail("a barrier other than 0");
        } else if (word == "shfl.sync.bfly.b32" || word == "shfl.sync.idx.b32") {
            i.kind = Kind::shuffle;
            i.out.push_back(register_of(next()));
            if (take("|")) i.out.push_back(register_of(next()));
            expect(",");
            rest(i);
        } else if (word == "bar.warp.sync") {
            i.kind = Kind::warp_barrier;
            rest(i);
        } else if (word == "redux.sync.max.s32") {
            i.kind = Kind::largest;
            outputs(i);
            rest(i);
        } else if (word == "vote.sync.ballot.b32") {
            i.kind = Kind::vote;
            outputs(i);
            if (take("!")) fail("a negated vote");
            rest(i);
        } else if (name == "bra") {
            i.kind = Kind::branch;
            jumps_.emplace_back(function_->body.size(), next());
        } else if (word == "brx.idx") {
            i.kind = Kind::branch_table;
            i.in.push_back(operand(next()));
            expect(",");
            jumps_.emplace_back(function_->body.size(), next());
        } else if (name == "call") {
            call(i);
        } else if (word == "ret" || word == "exit") {
            i.kind = Kind::ret;
        } else {
            arithmetic(i);
        }
        expect(";");
        function_->body.push_back(std::move(i));
    }

    void arithmetic(Instruction& i) {
        outputs(i);
        rest(i);
        if (i.text.rfind("mov.", 0) == 0 && i.out.size() + i.in.size() > 2) {
            i.kind = i.out.size() > 1 ? Kind::unpack : Kind::pack;
            i.bytes = bytes_of(split(i.text).back()) / int(std::max(i.out.size(), i.in.size()));
        } else if (!(i.work = find_work(i.text))) {
            fail(i.text);
        }
    }

    std::vector<Token> tokens_;
    size_t at_ = 0;
    std::unique_ptr<Program> program_;
    Function* function_ = nullptr;
    std::map<std::string, uint64_t> symbols_;  // shared variables and tables
    std::map<std::string, int> registers_, params_, labels_;
    std::map<std::string, std::vector<std::string>> tables_;
    std::vector<std::pair<size_t, std::string>> jumps_;
};

}  // namespace

std::unique_ptr<Program> parse(const std::string& text) { return Parser(text).parse(); }

}  // namespace ptx
