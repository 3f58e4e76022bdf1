package phonenumberservice_test

import (
	"os"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// buf breaking refuses what breaks a client; this refuses additions as well.
func TestProto_IsFrozen(t *testing.T) {
	frozen, err := os.ReadFile("frozen.json")
	if err != nil {
		t.Fatal(err)
	}
	var want descriptorpb.FileDescriptorSet
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(frozen, &want); err != nil {
		t.Fatal(err)
	}
	got := protodesc.ToFileDescriptorProto(pb.File_phonenumberservice_proto)
	if len(want.File) != 1 || !proto.Equal(got, want.File[0]) {
		t.Errorf("the proto is not the frozen one:\ngot  %v\nwant %v", got, want.File)
	}
}
